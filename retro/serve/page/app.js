// The page: tabs, the three forms, and what is remembered between them.

import { PREFIX, ask, call, onKeyNeeded } from "./api.js";
import { Pane, element, isRefused, plural, showPassages, showProblem } from "./render.js";

const byId = (id) => document.getElementById(id);
const RETRIEVERS = {
  dense: "meaning",
  bm25: "words",
  hybrid: "meaning and words",
  rerank: "meaning, then words",
};
const server = { model: "", retro: {} };
const answered = new Map(); // what each question was last answered, by question and retrieval
const ADDED = `retro-added ${PREFIX}`;
const added = new Map(JSON.parse(sessionStorage.getItem(ADDED) ?? "[]")); // key -> title of the documents added from here
let changing = false;
let running = null; // the AbortController of what streams now
let searching = null;
let lastAsked = "";

// --- said aloud -----------------------------------------------------------------------------------------------------

const say = (text) => {
  byId("status").textContent = text;
};

/** Gives a screen reader the stream in pieces of whole words, at most one a second: token by token it would stammer. */
class Speaker {
  #rest = "";
  #timer = null;

  constructor() {
    byId("spoken").replaceChildren();
  }

  add(text) {
    this.#rest += text;
    this.#timer ??= setTimeout(() => {
      this.#timer = null;
      const end = this.#rest.search(/\s\S*$/);
      if (end > 0) this.#say(end);
    }, 1000);
  }

  end() {
    clearTimeout(this.#timer);
    this.#say(this.#rest.length);
  }

  #say(end) {
    if (this.#rest.slice(0, end).trim()) byId("spoken").append(element("span", "", this.#rest.slice(0, end)));
    this.#rest = this.#rest.slice(end);
  }
}

// --- ask --------------------------------------------------------------------------------------------------------------

const mode = () => byId("ask-form").elements.mode.value;
const settings = (form) => ({
  k: byId(`${form}-k`).valueAsNumber,
  ...(byId(`${form}-retriever`).value && { retriever: byId(`${form}-retriever`).value }),
  ...(byId(`${form}-where`).value.trim() && { where: byId(`${form}-where`).value.trim() }),
});

async function askNow() {
  const question = byId("question").value.trim();
  if (question === "" || running !== null) return;
  lastAsked = question;
  running = new AbortController();
  const { signal } = running;
  const chosen = server.retro.retrieval ? mode() : "off";
  const bodies = [];
  if (chosen !== "off") bodies.push({ question, ...settings("ask") });
  if (chosen !== "on") bodies.push({ question, k: 0 });
  const names = chosen === "compare" ? ["With retrieval", "Without retrieval"] : ["Answer"];
  const panes = bodies.map((_, at) => new Pane(names[at]));
  byId("answers").replaceChildren(...panes.map((pane) => pane.root));
  byId("ask-results").dataset.mode = chosen;
  byId("ask-results").hidden = false;
  byId("ask-empty").hidden = true;
  listPassages("ask", [], chosen === "off" ? "" : "Looking for passages");
  byId("ask-passages").hidden = chosen === "off";
  byId("go").textContent = "Stop";
  say(chosen === "off" ? "Answering." : "Looking for passages.");
  const speaker = new Speaker();
  await Promise.all(panes.map((pane, at) => answer(pane, bodies[at], signal, at === 0 ? speaker : null)));
  speaker.end();
  running = null;
  byId("go").textContent = "Ask";
}

async function answer(pane, body, signal, speaker) {
  let show = () => {};
  let passages = [];
  const list = (found) => {
    passages = found;
    if (body.k === 0) return;
    show = listPassages("ask", found, found.length > 0 ? "" : nothingFound(body), (number) => pane.shade(number));
  };
  const overall = () => show(passages.map((passage) => passage.share), null);
  pane.wait(body.k === 0 ? "Answering" : "Looking for passages");
  try {
    const response = await ask(body, {
      signal,
      on: {
        passages: (found) => {
          list(found);
          pane.wait(`Reading ${plural(found.length, "passage")}`);
        },
        token: (text) => {
          pane.append(text);
          speaker?.add(text);
        },
      },
    });
    list(response.passages);
    const name = JSON.stringify(body);
    const before = answered.get(name);
    const given = isRefused(response) ? "I don\u2019t know." : response.answer.trim();
    answered.set(name, given);
    pane.finish(response, {
      before: before === given ? null : before,
      onWord: (part) => {
        if (part === null) {
          overall();
          pane.hint();
        } else {
          show(part.shares, part.bare);
          pane.explain(part, passages);
        }
      },
    });
    overall();
    if (speaker) say(isRefused(response) ? "I don\u2019t know." : `Answered, from ${plural(passages.length, "passage")}.`);
  } catch (error) {
    if (body.k !== 0) byId("ask-passages").hidden = passages.length === 0;
    if (signal.aborted) {
      pane.stopped();
      say("Stopped.");
    } else {
      pane.fail(error, askNow);
    }
  }
}

const nothingFound = (body) =>
  body.where ? "No passage is of a document that fulfills the filter." : "The index has no passage for this.";

/** Fills the passages of a panel and the note above them. */
function listPassages(panel, passages, note, onPoint = () => {}) {
  const place = byId(`${panel}-passages`);
  place.querySelector(".note").textContent = note;
  place.querySelector(".note").hidden = note === "";
  return showPassages(place.querySelector("ol"), passages, { isNew: (key) => added.has(key), onPoint });
}

const stop = () => running?.abort();

function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

// --- search -----------------------------------------------------------------------------------------------------------

async function searchNow() {
  searching?.abort();
  searching = new AbortController();
  const { signal } = searching;
  const body = { query: byId("query").value.trim(), ...settings("search") };
  if (body.query === "") return;
  showProblem(byId("search-error"), null);
  byId("search-empty").hidden = true;
  byId("search-passages").hidden = false;
  listPassages("search", [], "Searching");
  try {
    const { passages } = await call("v1/search", { body, signal });
    listPassages("search", passages, passages.length > 0 ? "" : nothingFound(body));
    say(passages.length > 0 ? `${plural(passages.length, "passage")} found.` : nothingFound(body));
  } catch (error) {
    if (signal.aborted) return;
    byId("search-passages").hidden = true;
    showProblem(byId("search-error"), error, searchNow);
  }
}

// --- documents --------------------------------------------------------------------------------------------------------

async function addDocument() {
  const [title, text, url] = ["title", "text", "url"].map((name) => byId(`document-${name}`).value.trim());
  const id = Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  const made = { id: `page-${id}`, title, text, ...(url && { url }) };
  await changeDocuments("POST", { documents: [made], update: true }, (reply) => {
    added.set(reply.keys[0], title);
    byId("document-form").reset();
    say(`${title} was added.`);
  });
}

async function removeDocument(key) {
  const title = added.get(key);
  await changeDocuments("DELETE", { keys: [key] }, () => {
    added.delete(key);
    say(`${title} was removed.`);
    byId("added-heading").focus(); // the button that had the focus goes away
  });
}

async function changeDocuments(method, body, done) {
  if (changing) return;
  changing = true;
  byId("add").textContent = method === "POST" ? "Adding" : "Removing";
  showProblem(byId("document-error"), null);
  try {
    done(await call("v1/documents", { method, body, kind: "admin" }));
    sessionStorage.setItem(ADDED, JSON.stringify([...added]));
    listAdded();
    await describe();
  } catch (error) {
    showProblem(byId("document-error"), error);
  } finally {
    changing = false;
    byId("add").textContent = "Add document";
  }
}

function listAdded() {
  const rows = [...added].map(([key, title]) => {
    const row = element("li");
    const button = element("button", "", "Remove");
    button.type = "button";
    button.setAttribute("aria-label", `Remove ${title}`);
    button.addEventListener("click", () => removeDocument(key));
    row.append(element("span", "", title), button);
    return row;
  });
  byId("added").replaceChildren(...rows);
  byId("added-note").hidden = rows.length > 0;
  byId("again").hidden = lastAsked === "";
  byId("again").textContent = `Ask again: ${lastAsked}`;
}

// --- tabs, keys, start ------------------------------------------------------------------------------------------------

const tabs = [...document.querySelectorAll("[role=tab]")];

function selectTab(tab, focus = false) {
  for (const each of tabs) {
    const selected = each === tab;
    each.setAttribute("aria-selected", String(selected));
    each.tabIndex = selected ? 0 : -1;
    byId(each.getAttribute("aria-controls")).hidden = !selected;
  }
  if (focus) tab.focus();
  if (tab.id === "tab-documents") listAdded();
  history.replaceState(null, "", tab.id === "tab-ask" ? "." : `#${tab.id.slice(4)}`);
}

function moveTab(event) {
  const shown = tabs.filter((tab) => !tab.hidden);
  const at = shown.indexOf(event.target);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  selectTab(shown.at(to % shown.length), true);
}

function askForKey(kind, refused) {
  const dialog = byId("key-dialog");
  byId("key-heading").textContent = kind === "admin" ? "Admin key" : "API key";
  const which = kind === "admin" ? "Changing documents needs the admin key of this server." : "This server answers to those with a key.";
  byId("key-note").textContent = `${refused ? "That key was refused. " : ""}${which} It is kept until this tab is closed.`;
  byId("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "use" ? byId("key").value.trim() : null), { once: true });
  });
}

/** Reads what the server has to offer, and shows no more than that. */
async function describe() {
  const { data } = await call("v1/models", { method: "GET" });
  Object.assign(server, { model: data[0].id, retro: data[0].retro });
  const { retrieval, retrievers, documents, admin } = server.retro;
  const searchable = retrievers.length > 0; // an index may be there for searches alone, beside a model that cannot read it
  byId("model").textContent = server.model;
  byId("about").textContent = searchable ? plural(documents, "document") : "answers without documents";
  document.title = `Ask ${server.model}`;
  byId("mode").hidden = !retrieval;
  for (const field of byId("ask-options").querySelectorAll(".field")) field.hidden = !retrieval;
  byId("tab-search").hidden = !searchable;
  byId("tab-documents").hidden = !searchable || !admin;
}

async function start() {
  showProblem(byId("connection"), null);
  try {
    await describe();
  } catch (error) {
    showProblem(byId("connection"), error, start);
    return;
  }
  byId("panels").hidden = false; // not before it is known what can be asked
  for (const form of ["ask", "search"]) {
    byId(`${form}-k`).max = server.retro.max_k;
    byId(`${form}-k`).value = server.retro.default_k || Math.min(10, server.retro.max_k);
    const options = server.retro.retrievers.map((name, place) => {
      const option = element("option", "", RETRIEVERS[name] ? `${RETRIEVERS[name]} (${name})` : name);
      option.value = place === 0 ? "" : name; // the server's own choice holds for whatever index it has then
      return option;
    });
    byId(`${form}-retriever`).replaceChildren(...options);
  }
  if (server.retro.default_k === 0) byId("ask-form").elements.mode.value = "off";
  greyOut();
  const wanted = tabs.find((tab) => !tab.hidden && location.hash === `#${tab.id.slice(4)}`);
  selectTab(wanted ?? tabs[0]);
  if (!wanted && document.activeElement === document.body) byId("question").focus();
}

function greyOut() {
  for (const field of byId("ask-options").querySelectorAll(".field :is(input, select)")) field.disabled = mode() === "off";
}

function onSubmit(id, act) {
  byId(id).addEventListener("submit", (event) => {
    event.preventDefault();
    act();
  });
}

onSubmit("ask-form", askNow);
byId("go").addEventListener("click", (event) => {
  if (running === null) return;
  event.preventDefault(); // also where the question has been emptied meanwhile
  stop();
});
onSubmit("search-form", searchNow);
onSubmit("document-form", addDocument);
byId("question").addEventListener("input", () => fit(byId("question")));
byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (running === null) byId("ask-form").requestSubmit();
});
byId("mode").addEventListener("change", greyOut);
byId("again").addEventListener("click", () => {
  selectTab(tabs[0]);
  byId("question").value = lastAsked;
  fit(byId("question"));
  byId("question").focus();
  askNow();
});
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
for (const tab of tabs) {
  tab.addEventListener("click", () => selectTab(tab));
  tab.addEventListener("keydown", moveTab);
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.defaultPrevented && !byId("key-dialog").open) stop();
});
onKeyNeeded(askForKey);
start();
