// The journal's versions, and what a turn has done, as articles.

import { difference, make, neighbours, percent, prompt, seconds, shown, terms, times, verdict } from "./view.js";

/** What an edit of a version is known to have done: from the report, else from the record. */
function outcome(entry, i) {
  const edit = entry.edits[i];
  const told = entry.answers?.edits[i];
  if (told) return told;
  const note = entry.note?.requests.find((one) => i >= one.first && i < one.first + one.before.length);
  return {
    before: note ? note.before[i - note.first] : null,
    after: edit.succeeded ? edit.target : null, // to hold is to give just the target
    succeeded: edit.succeeded,
    reason: null,
  };
}

/** Share of a version's edits that hold; null if it has none. */
export function held(entry) {
  const found = entry.edits.map((_, i) => outcome(entry, i).succeeded);
  return found.length ? found.filter(Boolean).length / found.length : null;
}

function edited(edit, did) {
  const unknown = () => make("i", {}, "not recorded");
  const both = did.before !== null && did.after !== null;
  const [before, after] = both
    ? difference(did.before, did.after)
    : [did.before, did.after].map((text) => (text === null ? unknown() : shown(text)));
  const others = (edit.other_forms ?? []).map((one) => make("div", {}, make("b", {}, `${one.form}: `), shown(one.after)));
  return make("li", {}, terms(
    ["Prompt", prompt(edit.prompt)],
    ["Target", shown(edit.target)],
    ["Before", before],
    ["After", after],
    ["Result", verdict(did.succeeded, did.reason)],
    edit.taught ? ["Taught as", edit.taught.join(", ")] : null,
    others.length ? ["In other forms", make("div", {}, ...others)] : null,
  ));
}

/** The answer to a request to edit. */
export function result(answer) {
  const parts = [];
  if (answer.rejected) {
    parts.push(make("p.banner.bad", {}, `A guard would stop this turn: ${answer.rejected}`));
  }
  parts.push(make("ol.plain", {}, ...answer.edits.map((edit) => edited(edit, edit))));
  parts.push(...neighbours(answer.specificity));
  const { total_ms, queue_ms, pause_ms } = answer.timings;
  parts.push(make("p.hint", {}, `${seconds(total_ms / 1000)} in all, ${seconds(queue_ms / 1000)} of it waiting; `
    + `the engine stood still for ${pause_ms.toFixed(1)} ms at most.`));
  return parts;
}

function heading(entry, newest) {
  const time = make("time", { datetime: entry.time }, new Date(entry.time).toLocaleString());
  const count = entry.edits.length;
  const holds = Math.round((held(entry) ?? 0) * count);
  const what = entry.kind === "delta"
    ? make("span", {}, "a delta file")
    : make(holds === count ? "span.good" : "span.bad", {}, `${holds === count ? "✓" : "✗"} ${holds} of ${times(count, "edit")} ${count === 1 ? "holds" : "hold"}`);
  const served = newest ? [make("b.badge", {}, "served")] : [];
  return make("p.row", {}, ...served, what, time);
}

function body(entry) {
  const parts = [];
  if (entry.kind === "delta") {
    parts.push(make("p.hint", {}, "Made elsewhere and applied here; the file has no prompts."));
  } else {
    parts.push(make("ol.plain", {}, ...entry.edits.map((edit, i) => edited(edit, outcome(entry, i)))));
  }
  if (entry.answers) parts.push(...neighbours(entry.answers.specificity));
  const { change, total_change: total, lost } = entry.guards ?? {};
  parts.push(terms(
    change === undefined ? null : ["Weights moved", `${percent(change)} of their norm, ${percent(total)} since version 0`],
    lost === undefined ? null : ["Own texts kept", percent(1 - lost)],
    ["Digest", make("code", {}, entry.digest)],
  ));
  return parts;
}

/**
 * A version of the journal.
 *
 * @param {object} entry of GET /v1/edits
 * @param {boolean} newest whether it is the one that is served
 * @param {{rollback: (version: number) => void, delta: (version: number) => void}} does
 */
export function article(entry, newest, does) {
  const { version } = entry;
  const id = `version-${version}`;
  const back = make("button", { type: "button" }, `Roll back to version ${version}`);
  back.addEventListener("click", () => does.rollback(version));
  const delta = make("button", { type: "button" }, `Save delta ${version}`);
  delta.addEventListener("click", () => does.delta(version));
  const details = make("details", { open: newest }, make("summary", {}, entry.kind === "delta" ? "Details" : "Edits"), ...body(entry));
  const box = make("article", { "aria-labelledby": id },
    make("h3", { id, tabindex: "-1" }, `Version ${version}`),
    heading(entry, newest),
    details,
    make("p.row", {}, ...(newest ? [] : [back]), delta));
  return make("li.version", { "data-version": version }, box);
}
