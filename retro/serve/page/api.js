// Requests to the server that this page came from: keys, errors, and server-sent events in the reply to a POST.

// Relative, so that the page works behind any prefix; several servers of one origin keep their keys apart.
export const PREFIX = new URL(".", document.baseURI).pathname;

/** A reply that is an error; status 0 means that none came, or that it broke off. */
export class ApiError extends Error {
  constructor(message, status, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }

  get retryable() {
    return this.status === 0 || this.status === 401 || this.status === 408 || this.status === 429 || this.status >= 500;
  }

  get headline() {
    const known = {
      0: "The server cannot be reached",
      401: "A key is needed",
      403: "This key does not allow that",
      404: "The server does not offer this",
      408: "The answer took too long",
      413: "That is too long",
      429: "The server is busy",
      503: "The server is not ready",
      504: "The answer took too long",
    };
    return known[this.status] ?? (this.status >= 500 ? "The server failed" : "That cannot be done");
  }
}

let askForKey = async () => null;
let asking = null;

/** Names who asks a person for a key: gets the kind ("user" or "admin") and whether one was refused; gives it or null. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

function storedKey(kind) {
  return sessionStorage.getItem(`retro-${kind}-key ${PREFIX}`);
}

async function newKey(kind, used) {
  if (storedKey(kind) !== used) return; // another request has asked meanwhile
  // One dialog, whatever number of requests wants a key.
  asking ??= askForKey(kind, used !== null).finally(() => (asking = null));
  const key = await asking;
  if (key === null) throw new ApiError("Nothing was sent.", 401);
  sessionStorage.setItem(`retro-${kind}-key ${PREFIX}`, key);
}

async function send(path, { method = "POST", body, signal, kind = "user" } = {}) {
  for (;;) {
    const key = storedKey(kind);
    const headers = { Accept: "application/json, text/event-stream" };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    // A key is printable ASCII; a header of anything else would be refused by the browser with an unclear message.
    if (key !== null && /^[\x21-\x7e]+$/.test(key)) headers.Authorization = `Bearer ${key}`;
    let reply;
    try {
      reply = await fetch(new URL(path, document.baseURI), {
        method,
        headers,
        signal,
        body: body === undefined ? undefined : JSON.stringify(body),
        credentials: "same-origin",
        cache: "no-store",
      });
    } catch (error) {
      if (signal?.aborted) throw error;
      const why = navigator.onLine ? "Check that it is running, then try again." : "This device is offline.";
      throw new ApiError(why, 0);
    }
    if (reply.ok) return reply;
    // 403 to a key that was typed as the admin's: it is somebody else's.
    if (reply.status !== 401 && !(reply.status === 403 && kind === "admin" && key !== null)) throw await errorOf(reply);
    await newKey(kind, key);
  }
}

async function errorOf(reply) {
  let message = "";
  try {
    message = (await reply.json()).error?.message ?? "";
  } catch {
    // A proxy's own page, or nothing: the status has to do.
  }
  const seconds = Number.parseInt(reply.headers.get("Retry-After") ?? "", 10);
  return new ApiError(String(message || `HTTP status ${reply.status}`), reply.status, seconds > 0 ? seconds : null);
}

/** Sends a request and gives the JSON of the reply. */
export async function call(path, options) {
  const reply = await send(path, options);
  return reply.status === 204 ? null : reply.json();
}

/** Asks, and gives the whole answer; `on.passages` and `on.token` are told what comes before it. */
export async function ask(body, { signal, on }) {
  const reply = await send("v1/ask", { body: { ...body, stream: true }, signal });
  if (!(reply.headers.get("Content-Type") ?? "").startsWith("text/event-stream")) return reply.json();
  try {
    for await (const { event, data } of events(reply.body)) {
      if (data === "[DONE]") continue;
      const value = JSON.parse(data);
      if (event === "passages") on.passages(value.passages);
      else if (event === "token") on.token(value.text);
      else if (event === "done") return value;
      else if (event === "error") throw new ApiError(String(value.error?.message ?? "unknown error"), value.error?.status ?? 500);
    }
  } catch (error) {
    if (signal?.aborted || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke off before the answer was complete.", 0);
  }
  throw new ApiError("The connection broke off before the answer was complete.", 0);
}

/** Parts a stream of bytes into server-sent events (HTML standard, section 9.2.6), as far as this server uses them. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      // A lone CR at the end may be half of a CRLF: it waits for what follows.
      const blocks = rest.replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        let event = "message";
        const data = [];
        for (const line of block.split("\n")) {
          const [, name, content] = /^([^:]*)(?:: ?(.*))?$/s.exec(line);
          if (name === "event") event = content;
          else if (name === "data") data.push(content ?? "");
        }
        if (data.length > 0) yield { event, data: data.join("\n") };
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the connection ends where nobody reads on
  }
}
