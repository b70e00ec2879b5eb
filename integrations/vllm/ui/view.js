// Elements of the page. Whatever came from a server or a model is text here, never markup.

import { compare } from "./diff.js";

const LONG = 400;
// Characters that are not seen, or that turn the text around them.
const UNSEEN = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb])/u;

/**
 * An element.
 *
 * @param {string} name of the tag, with classes: "p.hint"
 * @param {object} [attributes] null and false leave one out
 * @param {...(Node|string)} children strings become text
 */
export function make(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** Somebody's text: as it stands, in its own direction, with a mark at each character unseen. */
export function shown(value) {
  const box = make("span.text", { dir: "auto" }, ...seen(value));
  if (value.length > LONG) {
    box.classList.add("long");
    box.tabIndex = 0; // it scrolls
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `Text of ${value.length} characters`);
  }
  return box;
}

function seen(value) {
  return value.split(UNSEEN).filter(Boolean).map((part) => {
    if (!UNSEEN.test(part)) return part;
    const code = part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return make("bdi.unseen", { "data-code": `U+${code}` }, part);
  });
}

/** A prompt: a text, or chat messages. */
export function prompt(value) {
  if (typeof value === "string") return shown(value);
  const lines = value.map((one) => make("span.message-line", {}, make("b", {}, `${one.role}: `), shown(one.content)));
  return make("span.chat", {}, ...lines);
}

/** Two answers, in which the words that differ are marked. */
export function difference(before, after) {
  const runs = compare(before, after);
  const marked = (list, text, tag) => {
    const box = shown(text);
    box.replaceChildren(...list.map((run) => (run.same ? make("span", {}, ...seen(run.text)) : make(tag, {}, ...seen(run.text)))));
    return text === "" ? make("i", {}, "nothing") : box;
  };
  return [marked(runs.before, before, "del"), marked(runs.after, after, "ins")];
}

/** Terms and what they are: [term, node or text] each; null leaves one out. */
export function terms(...pairs) {
  const rows = pairs.filter((pair) => pair !== null);
  return make("dl", {}, ...rows.map(([term, value]) => make("div", {}, make("dt", {}, term), make("dd", {}, value))));
}

/** What became of an edit, in a word and a sign. */
export function verdict(holds, reason) {
  const text = holds ? "✓ holds" : `✗ ${reason ?? "does not hold"}`;
  return make(holds ? "span.good" : "span.bad", {}, text);
}

/** The answers to prompts that were to stand. */
export function neighbours(specificity) {
  if (!specificity.prompts.length) return [];
  const changed = specificity.prompts.filter((one) => !one.unchanged).length;
  const count = specificity.prompts.length;
  const list = specificity.prompts.map((one) => {
    const [before, after] = difference(one.before, one.after);
    const same = make("span", {}, shown(one.after), " ", make("span.good", {}, "✓ unchanged"));
    const answers = one.unchanged ? [["Answer", same]] : [["Before", before], ["After", after]];
    return make("li", {}, terms(["Prompt", prompt(one.prompt)], ...answers));
  });
  const head = `Locality: ${count - changed} of ${count} ${count === 1 ? "answer" : "answers"} unchanged`;
  return [make("details", { open: changed > 0 }, make("summary", {}, head), make("ol.plain", {}, ...list))];
}

export const percent = (share) => `${Math.round(share * 1000) / 10} %`;

export const times = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

export function seconds(value) {
  return value < 100 ? `${value.toFixed(value < 10 ? 1 : 0)} s` : `${Math.round(value / 60)} min`;
}
