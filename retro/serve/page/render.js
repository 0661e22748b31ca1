// What an answer and its passages look like. All that comes from documents or models is set as text, never as markup.

const percent = (share) => (share > 0 && share < 0.005 ? "< 1%" : `${Math.round(100 * share)}%`);
const seconds = (value) => `${value < 10 ? value.toFixed(2) : value.toFixed(0)} s`;
export const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** An element with a class and a text. */
export function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** A link where the address is http or https, and plain text where it is anything else. */
function linked(text, url) {
  let address = null;
  try {
    address = new URL(url); // without a base: a relative address would lead into this server
  } catch {
    // Many documents have none.
  }
  if (!["http:", "https:"].includes(address?.protocol)) return document.createTextNode(text);
  const link = element("a", "", text);
  link.href = address.href;
  link.rel = "noopener noreferrer";
  link.target = "_blank";
  return link;
}

/** The text of a passage with its span marked. Spans count code points, JavaScript's strings count halves of pairs. */
function marked(text, span) {
  if (!span) return [document.createTextNode(text)];
  const points = Array.from(text);
  const part = (start, end) => points.slice(start, end).join("");
  return [part(0, span[0]), element("mark", "", part(span[0], span[1])), part(span[1])];
}

/** Fills a list with passages; gives what shows their shares: of the answer, or of one word of it. */
export function showPassages(list, passages, { isNew = () => false, onPoint = () => {} } = {}) {
  const template = document.getElementById("passage-template");
  const cards = passages.map((passage) => {
    const card = template.content.firstElementChild.cloneNode(true);
    card.querySelector(".number").textContent = passage.number;
    card.querySelector("h3").append(linked(passage.title || passage.key, passage.url));
    if (isNew(passage.key)) card.querySelector("h3").append(" ", element("span", "new", "added by you"));
    const score = Number.isFinite(passage.score) ? `score ${passage.score.toPrecision(3)}` : "";
    card.querySelector(".source").textContent = [score, passage.title ? passage.key : ""].filter(Boolean).join(" \u00b7 ");
    card.querySelector(".body").append(...marked(passage.text, passage.span));
    card.addEventListener("pointerenter", () => onPoint(passage.number));
    card.addEventListener("pointerleave", () => onPoint(null));
    return card;
  });
  list.replaceChildren(...cards);

  return (shares, of) => {
    const most = Math.max(0, ...shares.filter((share) => share !== null));
    cards.forEach((card, at) => {
      const share = shares[at] ?? null;
      const row = card.querySelector(".share");
      row.hidden = share === null;
      card.classList.toggle("drawn-on", of !== null && share !== null && share > 0 && share >= most / 2);
      if (share === null) return;
      row.querySelector(".bar").style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
      row.querySelector("span").textContent = percent(share);
      row.title = of === null ? "Share of the answer that was drawn from this passage" : `Share of \u201c${of}\u201d`;
    });
  };
}

/**
 * Cuts an answer into words; a word has the probability and the shares of all its tokens.
 *
 * @returns {{text: string, bare: string, word: boolean, probability: number, shares: number[]|null}[]} words and what stands between them
 */
export function wordsOf(tokens) {
  const text = tokens.map((token) => token.text).join("");
  const owner = tokens.flatMap((token, at) => Array(token.text.length).fill(at));
  const parts = [];
  for (const match of text.matchAll(/\s+|\S+/g)) {
    const own = [...new Set(owner.slice(match.index, match.index + match[0].length))].map((at) => tokens[at]);
    const shared = own.filter((token) => token.shares?.length);
    const count = Math.max(0, ...shared.map((token) => token.shares.length));
    const mean = (at) => shared.reduce((sum, token) => sum + token.shares[at], 0) / shared.length;
    parts.push({
      text: match[0],
      bare: match[0].replace(/^[^\p{L}\p{N}]+|[^\p{L}\p{N}]+$/gu, "") || match[0], // without the punctuation around it
      word: match[0].trim() !== "",
      probability: Math.exp(own.reduce((sum, token) => sum + (token.log_prob ?? 0), 0)),
      shares: count > 0 ? Array.from({ length: count }, (_, at) => mean(at)) : null,
    });
  }
  while (parts.length > 0 && !parts[0].word) parts.shift();
  while (parts.length > 0 && !parts.at(-1).word) parts.pop();
  return parts;
}

const DONT_KNOW = /^i (?:do not|don.t) know\.?$/i;

/** Whether the model says that it does not know, by its doubts or in words. */
export const isRefused = (response) => response.refused === true || DONT_KNOW.test(response.answer.trim());

/** One answer on the page: streaming, finished, stopped or failed. */
export class Pane {
  constructor(heading) {
    this.root = document.getElementById("answer-template").content.firstElementChild.cloneNode(true);
    this.text = this.root.querySelector(".text");
    this.drawn = this.root.querySelector(".drawn");
    this.root.querySelector("h2").textContent = heading;
    this.words = [];
  }

  /** Before the first token: says what is being waited for. */
  wait(what) {
    this.root.setAttribute("aria-busy", "true");
    this.text.className = "text waiting";
    this.text.textContent = what;
  }

  append(text) {
    if (this.text.classList.contains("waiting")) {
      this.text.className = "text writing";
      this.text.textContent = "";
    }
    const before = this.text.textContent;
    this.text.append(before === "" ? text.trimStart() : text);
  }

  /** The whole answer; `onWord` is told which word is looked at, or null. */
  finish(response, { onWord, before }) {
    this.#done();
    const parts = wordsOf(response.tokens ?? []);
    const answer = response.answer.trim();
    const refused = isRefused(response);
    this.root.classList.toggle("refused", refused);
    if (refused) this.#verdict(answer);
    else if (parts.length > 0) this.#words(parts, onWord);
    else this.text.textContent = answer || "(an empty answer)";
    const { retrieval, decoding } = response.seconds ?? {};
    const facts = [
      Number.isFinite(response.confidence) ? `Confidence ${percent(response.confidence)}` : "",
      Number.isFinite(retrieval) && response.passages.length > 0 ? `passages in ${seconds(retrieval)}` : "",
      Number.isFinite(decoding) ? `answer in ${seconds(decoding)}` : "",
    ];
    this.#note(".meta", facts.filter(Boolean).join(" \u00b7 "));
    if (before) this.#note(".before", `Before: ${before}`);
  }

  stopped() {
    this.#done();
    if (this.text.textContent === "") this.text.hidden = true;
    this.#note(".meta", "Stopped.");
  }

  fail(error, onRetry) {
    this.#done();
    if (this.text.textContent === "") this.text.hidden = true;
    showProblem(this.root.querySelector(".problem"), error, onRetry);
  }

  /** Shades the words by their shares of one passage; null takes the shades away. */
  shade(number) {
    for (const [at, word] of this.words) {
      const share = number === null ? 0 : (at.shares[number - 1] ?? 0);
      word.style.backgroundColor = share > 0 ? `rgb(var(--shade) / ${(0.32 * Math.min(1, share)).toFixed(3)})` : "";
    }
  }

  #done() {
    this.root.removeAttribute("aria-busy");
    if (this.text.classList.contains("waiting")) this.text.textContent = "";
    this.text.className = "text";
  }

  #note(selector, text) {
    const note = this.root.querySelector(selector);
    note.textContent = text;
    note.hidden = text === "";
  }

  #verdict(answer) {
    this.text.textContent = "I don\u2019t know.";
    const said = answer && !DONT_KNOW.test(answer) ? ` The likeliest words were \u201c${answer}\u201d` : "";
    this.#note(".verdict", `The model is not sure enough to answer.${said}`);
  }

  #words(parts, onWord) {
    this.text.replaceChildren();
    for (const part of parts) {
      if (!part.word || part.shares === null) {
        this.text.append(part.text);
        continue;
      }
      const word = element("span", "word", part.text);
      word.tabIndex = -1;
      this.text.append(word);
      this.words.push([part, word]);
    }
    if (this.words.length === 0) return;
    this.words[0][1].tabIndex = 0;
    this.drawn.hidden = false;
    this.drawn.id = "drawn-on";
    this.hint();
    this.#listen(onWord);
  }

  #listen(onWord) {
    const find = (node) => this.words.find(([, word]) => word === node) ?? null;
    let hovered = null;
    let focused = null;
    const update = () => {
      const active = hovered ?? focused;
      for (const [, word] of this.words) word.classList.toggle("active", word === active?.[1]);
      onWord(active?.[0] ?? null);
    };
    this.text.addEventListener("pointerover", (event) => {
      if (event.pointerType === "touch") return; // a tap moves the focus, and stays
      hovered = find(event.target) ?? hovered; // the gaps between words change nothing
      update();
    });
    this.text.addEventListener("pointerleave", () => {
      hovered = null;
      update();
    });
    this.text.addEventListener("focusin", (event) => {
      focused = find(event.target);
      if (focused === null) return;
      for (const [, word] of this.words) word.tabIndex = word === focused[1] ? 0 : -1;
      focused[1].setAttribute("aria-describedby", this.drawn.id);
      update();
    });
    this.text.addEventListener("focusout", () => {
      focused = null;
      update();
    });
    this.text.addEventListener("keydown", (event) => {
      const at = this.words.findIndex(([, word]) => word === event.target);
      const last = this.words.length - 1;
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last }[event.key];
      if (event.key === "Escape") event.target.blur();
      if (to === undefined || at < 0) return;
      event.preventDefault();
      this.words[Math.min(last, Math.max(0, to))][1].focus();
    });
  }

  /** What stands below the answer while no word is looked at. */
  hint() {
    this.drawn.replaceChildren(
      element("p", "soft", "Point at a word, or tap it, to see which passages it drew on; by keyboard, Tab and the arrow keys."),
    );
  }

  /** The passages that a word drew on most, below the answer: on a phone the list itself is out of sight. */
  explain(part, passages) {
    const lead = element("p", "", `\u201c${part.bare}\u201d `);
    lead.append(element("span", "soft", `probability ${percent(part.probability)}, drawn from`));
    const best = part.shares.map((share, at) => [share, passages[at]]).filter(([share, passage]) => share > 0 && passage);
    best.sort(([a], [b]) => b - a);
    const rows = best.slice(0, 3).map(([share, passage]) => {
      const row = element("li");
      row.append(
        element("span", "number", passage.number),
        element("span", "title", passage.title || passage.key),
        element("span", "soft", percent(share)),
      );
      return row;
    });
    const list = element("ol");
    list.append(...rows);
    this.drawn.replaceChildren(lead, rows.length > 0 ? list : element("p", "soft", "no passage"));
  }
}

/** Says what went wrong, and offers to try again where that can help; without an error, says nothing. */
export function showProblem(place, error, onRetry = null) {
  place.replaceChildren();
  place.hidden = !error;
  if (!error) return;
  place.className = "problem";
  place.setAttribute("role", "alert");
  place.append(element("strong", "", error.headline ?? "The page failed"));
  const wait = error.retryAfter ? ` Try again in ${plural(error.retryAfter, "second")}.` : "";
  place.append(element("p", "", `${error.message}${wait}`));
  if (!onRetry || !error.retryable) return;
  const retry = element("button", "", "Try again");
  retry.type = "button";
  retry.addEventListener("click", onRetry);
  place.append(retry);
}
