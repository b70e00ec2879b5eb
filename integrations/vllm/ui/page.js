// The page for operators: what is served, what was done, and what is to be done next.

import { call, key, newKey } from "./api.js";
import * as delta from "./delta.js";
import * as form from "./form.js";
import { plot } from "./plot.js";
import { article, result } from "./versions.js";
import { make, seconds, times } from "./view.js";

const PENDING = "ultraedit.pending";
const AT_ONCE = 20;
const BUSY = 2; // seconds between two looks: while something is under way,
const IDLE = 15; // while nothing has changed for long,
const LOST = 60; // and while the server does not answer

const at = (id) => document.getElementById(id);
const state = {
  entries: [], // the journal, newest first, as far as it was fetched
  more: false,
  health: null,
  digests: null, // of the last reading back
  told: null, // the version that was announced last
  changes: 0, // made here; what was asked before one is old news after it
  wait: BUSY,
  timer: 0,
  looking: null, // the look that is under way
  sending: false,
};

// Telling

function say(text) {
  at("said").textContent = text;
}

function tell(id, text) {
  at(`${id}-text`).textContent = text ?? "";
  at(id).hidden = text === null;
}

const typing = () => document.activeElement?.matches("textarea, input, select") ?? false;

/** Tell what a call has failed with; a key that is refused is asked for again. */
function failed(error, where = "notice") {
  if (error.status === undefined) throw error; // a fault of this page
  if (error.refused) return askForKey(error);
  tell(where, `${error.message}${error.retryAfter ? ` Try again in ${error.retryAfter} s.` : ""}`);
  if (!typing()) at(where).focus();
}

/** Keep something in this tab's storage; what is too long for it is not kept. */
function keep(name, value) {
  try {
    sessionStorage.setItem(name, value);
  } catch {
    sessionStorage.removeItem(name);
  }
}

// The key

function askForKey(error = null) {
  clearTimeout(state.timer);
  key.forget();
  tell("problem", null);
  at("served").textContent = "Not connected";
  at("served").className = "served";
  at("forget").hidden = true;
  at("key-section").hidden = false;
  at("key-problem").textContent = error === null ? ""
    : `The server refuses this key: ${error.message}. Enter another one; what you have typed elsewhere stays.`;
  if (!typing()) at("key").focus();
}

async function useKey(event) {
  event.preventDefault();
  key.set(at("key").value.trim());
  at("key").value = "";
  at("key-problem").textContent = "";
  await lookSoon();
  if (key.get() !== null && state.health) at("form-heading").focus();
}

function forgetKey() {
  state.entries = [];
  state.health = state.digests = null;
  at("main").hidden = at("result").hidden = true;
  for (const id of ["versions", "plot", "queue", "ranks", "result-body"]) at(id).replaceChildren();
  askForKey();
}

// Looking

/** Ask what is served and, if that is news, what was done; then again, sooner or later. */
async function look() {
  clearTimeout(state.timer);
  if (key.get() === null) return;
  const { changes } = state;
  try {
    const [health, newest] = await Promise.all([call("/health"), call("?limit=1")]);
    const news = JSON.stringify(newest.data) !== JSON.stringify(state.entries.slice(0, 1));
    if (changes !== state.changes) return;
    if (news || state.health === null) await fetchVersions();
    if (key.get() === null) return; // it was forgotten meanwhile
    const busy = health.turn || health.queue.length > 0;
    state.wait = busy || news ? BUSY : Math.min(state.wait * 1.5, IDLE);
    connected(health, news, changes === state.changes);
  } catch (error) {
    state.wait = Math.min(Math.max(state.wait, BUSY) * 2, LOST);
    if (error.status === undefined) throw error;
    if (error.refused) return askForKey(error);
    at("served").textContent = "No connection";
    at("served").className = "served bad";
    at("key-section").hidden = true;
    tell("problem", `${error.message} Trying again in ${Math.round(state.wait)} s.`);
  } finally {
    if (key.get() !== null && !document.hidden) state.timer = setTimeout(lookAgain, state.wait * 1000);
  }
}

/** One look at a time. */
async function lookAgain() {
  await state.looking;
  state.looking ??= look().finally(() => {
    state.looking = null;
  });
  await state.looking;
}

function lookSoon() {
  state.wait = BUSY;
  return lookAgain();
}

/** The newest versions. Older ones that are here stay, if a version of both is the same. */
async function fetchVersions() {
  const page = await call(`?limit=${AT_ONCE}`);
  const oldest = page.data.at(-1)?.version ?? 0;
  const same = (a, b) => a.version === b.version && a.digest === b.digest && a.time === b.time;
  const linked = page.data.some((entry) => state.entries.some((known) => same(entry, known)));
  const rest = linked ? state.entries.filter((entry) => entry.version < oldest) : [];
  if (!rest.length) state.more = page.has_more;
  state.entries = [...page.data, ...rest];
}

async function fetchOlder() {
  try {
    const page = await call(`?limit=${AT_ONCE}&before=${state.entries.at(-1).version}`);
    state.entries = [...state.entries, ...page.data];
    state.more = page.has_more;
    showVersions();
    at(`version-${page.data[0]?.version}`)?.focus();
  } catch (error) {
    failed(error);
  }
}

function connected(health, news, last) {
  const before = state.health;
  state.health = health;
  tell("problem", null);
  at("key-section").hidden = true;
  at("forget").hidden = false;
  at("main").hidden = false;
  showHealth();
  if (news || before === null) showVersions();
  if (state.sending || !last) return; // what was done here is told as its answer
  if (state.told !== null && state.told !== health.version) say(`Version ${health.version} is served now.`);
  state.told = health.version;
}

// Showing

function showHealth() {
  const { status, version, ranks, queue, turn, follows, traffic_keys: traffic } = state.health;
  const well = status === "ok";
  at("served").textContent = well ? `Serving version ${version}` : "Ranks differ";
  at("served").className = `served ${well ? "good" : "bad"}`;
  document.title = `Version ${version} – Edits – ${location.host}`;
  at("health-text").textContent = well
    ? `${times(ranks.length, "rank")}, ${ranks.length === 1 ? "which serves" : "all of which serve"} version ${version}.`
    : "Not all ranks serve what the journal says. Restart the server: every rank replays the journal.";
  if (follows) at("health-text").textContent += ` ${followText(follows)}`;
  if (traffic) at("health-text").textContent += ` ${traffic} keys of live traffic are held still for each module.`;
  at("health-text").className = well ? "" : "banner bad";
  const read = state.digests?.version === version ? state.digests : null;
  at("ranks").replaceChildren(...ranks.map((rank) => {
    const digest = read?.of[`${rank.engine}/${rank.rank}`];
    return make("tr", {}, make("td", {}, `${rank.engine}`), make("td", {}, `${rank.rank}`),
      make("td", {}, `${rank.version}`), make("td", {}, digest ? make("code", {}, digest) : "not read"));
  }));
  at("queue").replaceChildren(...queue.map((change, i) => make("li", {}, changeText(change, i))));
  at("queue-text").textContent = queue.length ? "" : turn ? "A change of another API server is under way." : "Nothing is under way.";
}

function followText({ leader, behind, error }) {
  const how = error ? `but: ${error}` : behind ? `${times(behind, "version")} behind` : "in step";
  return `The server follows ${leader}, ${how}. Changes are made there.`;
}

function changeText({ kind, edits, dry_run: dry, seconds: age }, i) {
  const what = kind === "edit" ? `${dry ? "dry run" : "turn"} of ${times(edits, "edit")}` : kind === "apply" ? "delta file" : "rollback";
  return `${what}, ${i ? "waiting" : "under way"}, ${seconds(age)}`;
}

/** Make the list that of the entries; what has not changed stays as it is, opened or focused. */
function showVersions() {
  const list = at("versions");
  const known = new Map(Array.from(list.children, (item) => [item.dataset.version, item]));
  const items = state.entries.map((entry, i) => {
    const content = JSON.stringify([i === 0, entry]);
    const old = known.get(`${entry.version}`);
    if (old?.content === content) return old;
    const item = article(entry, i === 0, { rollback: confirmRollback, delta: saveDelta });
    item.content = content;
    if (old?.contains(document.activeElement)) setTimeout(() => at(`version-${entry.version}`)?.focus());
    return item;
  });
  if (items.length !== list.children.length || items.some((item, i) => item !== list.children[i])) {
    list.replaceChildren(...items);
  }
  at("older").hidden = !state.more;
  at("back-to-0").hidden = state.entries.length === 0;
  at("served-0").hidden = state.entries.length > 0;
  showPlot();
}

function showPlot() {
  const open = at("plot").querySelector("details")?.open ?? false;
  at("plot").replaceChildren(...plot(state.entries, at("plot").clientWidth));
  at("plot").querySelector("details")?.toggleAttribute("open", open);
}

async function readBack() {
  say("The weights are read back.");
  try {
    const health = await call("/health?digest=true", undefined, { wait: true });
    const of = Object.fromEntries(health.ranks.map((rank) => [`${rank.engine}/${rank.rank}`, rank.digest]));
    state.digests = { version: health.version, of };
    state.health = health;
    showHealth();
    say(health.status === "ok" ? "All ranks have the weights that the journal says." : "Ranks differ.");
  } catch (error) {
    failed(error);
  }
}

// Editing

function pending() {
  return JSON.parse(sessionStorage.getItem(PENDING));
}

/** Send a turn. Until its answer is here the body is kept, with the key by which it is made once. */
async function send(body) {
  if (state.sending) return;
  state.sending = true;
  const begun = Date.now();
  const what = body.dry_run ? "Dry run" : "Edit";
  if (!body.dry_run) keep(PENDING, JSON.stringify(body));
  tell("form-problem", null);
  at("pending").hidden = at("result").hidden = true;
  at("form").setAttribute("aria-busy", "true");
  const tick = setInterval(() => {
    at("elapsed").textContent = `${what} under way, ${seconds((Date.now() - begun) / 1000)}`;
  }, 200);
  say(`${what} under way.`);
  setTimeout(lookSoon, 300);
  try {
    const answer = await call("", body, { wait: true });
    sessionStorage.removeItem(PENDING);
    if (!body.dry_run) changedTo(answer.version);
    showResult(answer, body.dry_run);
  } catch (error) {
    const lost = error.status === 0 && !body.dry_run;
    if (!lost) sessionStorage.removeItem(PENDING);
    at("pending").hidden = !lost;
    failed(error, "form-problem");
  } finally {
    clearInterval(tick);
    at("elapsed").textContent = "";
    at("form").removeAttribute("aria-busy");
    state.sending = false;
    lookSoon();
  }
}

function changedTo(version) {
  state.changes += 1;
  state.told = version;
}

function showResult(answer, dry) {
  const holds = answer.edits.filter((edit) => edit.succeeded).length;
  const count = `${holds} of ${times(answer.edits.length, "edit")} ${answer.edits.length === 1 ? "holds" : "hold"}`;
  const text = !dry ? `Version ${answer.version} was made: ${count}.`
    : answer.rejected ? "Dry run: a guard would stop this turn." : `Dry run: ${count}. Nothing was changed.`;
  at("result-heading").textContent = text;
  at("result-body").replaceChildren(...result(answer));
  at("result").hidden = false;
  say(text);
}

function submit(event) {
  event.preventDefault();
  const edits = form.read();
  if (event.submitter?.value === "dry-run") send({ edits, dry_run: true });
  else send({ edits, dry_run: false, idempotency_key: newKey() });
}

/** After a delta file was applied. */
async function applied(version) {
  changedTo(version);
  await lookSoon();
}

// Going back

let asked = null;

function confirmRollback(version) {
  const newest = state.entries[0]?.version ?? 0;
  const lost = newest - version === 1 ? `Version ${newest} is forgotten` : `Versions ${version + 1} to ${newest} are forgotten`;
  asked = { version, newest: JSON.stringify(state.entries[0]), from: document.activeElement };
  at("confirm-heading").textContent = `Roll back to version ${version}?`;
  at("confirm-text").textContent = `${lost}, for all users at once. Save their deltas first if they may be wanted again.`
    + (version ? "" : " Version 0 is the untouched model.");
  at("confirm-problem").textContent = "";
  at("confirm-yes").textContent = `Roll back to version ${version}`;
  at("confirm").showModal();
  at("confirm-no").focus();
}

async function rollBack() {
  const { version } = asked;
  at("confirm-yes").setAttribute("aria-disabled", "true");
  try {
    const { data } = await call("?limit=1");
    if (JSON.stringify(data[0]) !== asked.newest) {
      at("confirm-problem").textContent = "Meanwhile the versions have changed, see the list. Cancel, and decide again.";
      return;
    }
    const done = await call("/rollback", { version }, { wait: true });
    changedTo(done.version);
    at("confirm").close();
    say(`Version ${done.version} is served again.`);
    at("result").hidden = true;
    await lookSoon();
    setTimeout(() => (at(`version-${version}`) ?? at("versions-heading")).focus());
  } catch (error) {
    if (error.refused) at("confirm").close();
    if (error.refused || error.status === undefined) failed(error);
    else at("confirm-problem").textContent = error.message;
  } finally {
    at("confirm-yes").removeAttribute("aria-disabled");
  }
}

async function saveDelta(version) {
  try {
    const file = await call(`/${version}/delta`, undefined, { wait: true, file: true });
    const link = make("a", { download: `ultraedit-${`${version}`.padStart(6, "0")}.safetensors` });
    link.href = URL.createObjectURL(file);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    say(`The delta of version ${version} is saved.`);
  } catch (error) {
    failed(error);
  }
}

// Opening

function open() {
  at("host").textContent = location.host;
  form.open();
  delta.open({ applied, failed, say, tell });
  at("key-form").addEventListener("submit", useKey);
  at("form").addEventListener("submit", submit);
  const clicks = {
    forget: forgetKey,
    retry: lookSoon,
    older: fetchOlder,
    "read-back": readBack,
    "back-to-0": () => confirmRollback(0),
    "confirm-no": () => at("confirm").close(),
    "confirm-yes": () => at("confirm-yes").hasAttribute("aria-disabled") || rollBack(),
    "ask-again": () => send(pending()),
    "give-up": () => {
      sessionStorage.removeItem(PENDING);
      at("pending").hidden = true;
    },
    "notice-seen": () => tell("notice", null),
  };
  for (const [id, does] of Object.entries(clicks)) at(id).addEventListener("click", does);
  window.addEventListener("resize", showPlot);
  document.addEventListener("visibilitychange", () => document.hidden || lookSoon());
  at("pending").hidden = pending() === null;
  if (key.get() === null) askForKey();
  else lookSoon();
}

open();
