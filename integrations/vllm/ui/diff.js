// Which words of two texts differ.

const MOST_CELLS = 1_000_000;
const segmenter = Intl.Segmenter && new Intl.Segmenter(undefined, { granularity: "word" });

/** A text in words, spaces and signs; joined they are the text. */
export function words(text) {
  if (segmenter) return Array.from(segmenter.segment(text), (part) => part.segment);
  return text.match(/[\p{L}\p{N}_]+|\s+|[^\p{L}\p{N}_\s]/gu) ?? [];
}

/**
 * The two texts in runs of words that both have, and that only one has.
 *
 * @returns {{before: Run[], after: Run[]}} a Run is {text, same}; joined they are the texts
 */
export function compare(before, after) {
  const [a, b] = [words(before), words(after)];
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a.at(-1 - end) === b.at(-1 - end)) end += 1;
  const middle = common(a.slice(start, a.length - end), b.slice(start, b.length - end));
  const keep = (list, inside) => [
    ...Array(start).fill(true), ...inside, ...Array(list.length - start - inside.length).fill(true),
  ];
  return { before: runs(a, keep(a, middle.a)), after: runs(b, keep(b, middle.b)) };
}

/** Which of each list's words are in their longest common subsequence; none if they are too many. */
function common(a, b) {
  const marks = { a: a.map(() => false), b: b.map(() => false) };
  const width = b.length + 1;
  if ((a.length + 1) * width > MOST_CELLS) return marks;
  const longest = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      longest[i * width + j] = a[i] === b[j]
        ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) {
      marks.a[i++] = marks.b[j++] = true;
    } else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) {
      i += 1;
    } else {
      j += 1;
    }
  }
  return marks;
}

function runs(list, same) {
  const found = [];
  list.forEach((text, i) => {
    // A space between two words that differ goes with them.
    const alone = same[i] && !text.trim() && same[i - 1] === false && same[i + 1] === false;
    const last = found.at(-1);
    const both = same[i] && !alone;
    if (last?.same === both) last.text += text;
    else found.push({ text, same: both });
  });
  return found;
}
