// A delta file of the operator's: tried, or applied.

import { call, newKey } from "./api.js";

const at = (id) => document.getElementById(id);
let page = null; // what the page is told by
let made = newKey(); // with which the chosen file is applied once, however often it is sent

/** Tell what became of the file. */
function show(text) {
  at("delta-result").textContent = text ?? "";
  at("delta-result").hidden = text === null;
  if (text !== null) page.say(text);
}

function chosen() {
  made = newKey();
  show(null);
  page.tell("delta-problem", null);
}

function told({ version, digest, rejected, again }, dry) {
  if (rejected) return `Dry run: a guard would reject it: ${rejected}`;
  if (dry && again) return `Dry run: it was applied before, as version ${version}.`;
  if (dry) return `Dry run: it passes, and the weights would have digest ${digest}. Nothing was changed.`;
  return again ? `It was applied before, as version ${version}.` : `Version ${version} was made.`;
}

async function submit(event) {
  event.preventDefault();
  const form = at("delta-form");
  const [file] = at("delta-file").files;
  if (form.hasAttribute("aria-busy")) return;
  const dry = event.submitter?.value === "dry-run";
  form.setAttribute("aria-busy", "true");
  page.tell("delta-problem", null);
  show(null);
  page.say(`The file is ${dry ? "tried" : "applied"}.`);
  try {
    const how = `idempotency_key=${made}${dry ? "&dry_run=true" : ""}`;
    const answer = await call(`/apply?${how}`, file, { wait: true });
    if (!dry) await page.applied(answer.version);
    show(told(answer, dry));
  } catch (error) {
    page.failed(error, "delta-problem");
  } finally {
    form.removeAttribute("aria-busy");
  }
}

/**
 * Take files.
 *
 * @param {{applied: Function, failed: Function, say: Function, tell: Function}} told how the page
 *     is told of a version, of an error, of news for a screen reader, and of a problem
 */
export function open(told) {
  page = told;
  at("delta-file").addEventListener("change", chosen);
  at("delta-form").addEventListener("submit", submit);
}
