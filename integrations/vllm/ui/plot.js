// Scores over versions: a drawing for the eye, and the same figures as a table.

import { make, percent } from "./view.js";
import { held } from "./versions.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const LEAST_WIDTH = 280;
const HEIGHT = 220;
const EDGE = { left: 56, right: 14, top: 12, bottom: 28 };
const TICK_WIDTH = 50;

const SERIES = [
  { name: "Edits that hold", mark: "circle", of: held },
  { name: "Locality answers unchanged", mark: "square", of: (entry) => entry.answers?.specificity.score ?? null },
  { name: "Own texts kept", mark: "triangle", of: (entry) => (entry.guards?.lost === undefined ? null : 1 - entry.guards.lost) },
];

function draw(name, attributes, ...children) {
  const element = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function mark(kind, x, y) {
  const at = { class: `mark ${kind}` };
  if (kind === "circle") return draw("circle", { ...at, cx: x, cy: y, r: 4 });
  if (kind === "square") return draw("rect", { ...at, x: x - 4, y: y - 4, width: 8, height: 8 });
  return draw("path", { ...at, d: `M${x} ${y - 5}l5 9h-10z` });
}

function axes(versions, x, y, width) {
  const parts = [0, 0.5, 1].flatMap((share) => [
    draw("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(share), y2: y(share) }),
    draw("text", { class: "tick", x: EDGE.left - 8, y: y(share) + 4, "text-anchor": "end" }, percent(share)),
  ]);
  const step = Math.ceil(versions.length / Math.floor(width / TICK_WIDTH));
  for (let i = versions.length - 1; i >= 0; i -= step) {
    parts.push(draw("text", { class: "tick", x: x(versions[i]), y: HEIGHT - 8, "text-anchor": "middle" }, `${versions[i]}`));
  }
  return parts;
}

function series({ name, mark: kind, of }, entries, x, y) {
  const points = entries.map((entry) => [entry.version, of(entry)]);
  const parts = [];
  let path = "";
  points.forEach(([version, share], i) => {
    if (share === null) return;
    path += `${i && points[i - 1][1] !== null ? "L" : "M"}${x(version)} ${y(share)}`;
    const one = mark(kind, x(version), y(share));
    one.append(draw("title", {}, `Version ${version}, ${name}: ${percent(share)}`));
    parts.push(one);
  });
  return draw("g", {}, draw("path", { class: `line ${kind}`, d: path || "M0 0" }), ...parts);
}

function legend() {
  return make("ul.legend", { "aria-hidden": "true" }, ...SERIES.map(({ name, mark: kind }) => {
    const sign = draw("svg", { viewBox: "0 0 24 12", width: 24, height: 12 },
      draw("path", { class: `line ${kind}`, d: "M0 6H24" }), mark(kind, 12, 6));
    return make("li", {}, sign, ` ${name}`);
  }));
}

function table(entries) {
  const head = ["Version", ...SERIES.map((one) => one.name)].map((name) => make("th", { scope: "col" }, name));
  const rows = entries.toReversed().map((entry) => make("tr", {},
    make("th", { scope: "row" }, `${entry.version}`),
    ...SERIES.map(({ of }) => make("td", {}, of(entry) === null ? "–" : percent(of(entry))))));
  return make("details", {}, make("summary", {}, "The figures"),
    make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
}

/**
 * The plot of journal entries.
 *
 * @param {object[]} newestFirst as GET /v1/edits lists them
 * @param {number} room pixels that it may be wide
 * @returns {Node[]}
 */
export function plot(newestFirst, room) {
  const entries = newestFirst.toReversed();
  if (!entries.length) return [make("p.hint", {}, "There are no versions yet.")];
  const versions = entries.map((entry) => entry.version);
  const [first, last] = [versions[0], versions.at(-1)];
  const width = Math.max(room, LEAST_WIDTH);
  const wide = width - EDGE.left - EDGE.right - 20;
  const x = (version) => EDGE.left + 10 + (last === first ? wide / 2 : (wide * (version - first)) / (last - first));
  const y = (share) => EDGE.top + (1 - share) * (HEIGHT - EDGE.top - EDGE.bottom);
  const said = `Versions ${first} to ${last}; the table below has the figures.`;
  const picture = draw("svg", { class: "plot", viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `Scores over versions. ${said}` },
    ...axes(versions, x, y, width), ...SERIES.map((one) => series(one, entries, x, y)));
  return [picture, legend(), table(entries)];
}
