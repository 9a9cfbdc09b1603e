// Finds formulas in Markdown: $...$, $$...$$, \(...\) and \[...\]. Knows markdown-it's rules; draws nothing.

const DELIMITERS = [["$$", "$$", true], ["\\[", "\\]", true], ["\\(", "\\)", false], ["$", "$", false]];

/** A markdown-it plugin: formulas become tokens `math_inline` and `math_block`, whose content is the TeX. */
export function mathRules(md) {
  // Before `escape`, which would take the backslash of \( for itself.
  md.inline.ruler.before("escape", "math_inline", inlineRule);
  md.block.ruler.before("fence", "math_block", blockRule, { alt: ["paragraph", "reference", "blockquote", "list"] });
}

function inlineRule(state, silent) {
  const { src, pos } = state;
  const found = DELIMITERS.find(([open]) => src.startsWith(open, pos));
  if (!found) return false;
  const [open, close, display] = found;
  const start = pos + open.length;
  const end = closing(src, start, close);
  if (end < 0 || (open === "$" && !isFormula(src, start, end))) return false;
  if (!silent) Object.assign(state.push("math_inline", "", 0), { content: src.slice(start, end), meta: { display } });
  state.pos = end + close.length;
  return true;
}

/** Where the formula ends; what a backslash precedes ends nothing, unless the end is a backslash itself. */
function closing(src, start, close) {
  for (let at = src.indexOf(close, start); at >= 0; at = src.indexOf(close, at + 1)) {
    let slashes = 0;
    while (src[at - 1 - slashes] === "\\") slashes++;
    if (slashes % 2 === 0) return at > start ? at : -1;
  }
  return -1;
}

/** Between single dollars only if it cannot be two prices: no space inside the dollars, no digit behind. */
function isFormula(src, start, end) {
  return !/\s/.test(src[start]) && !/\s/.test(src[end - 1]) && !/\d/.test(src[end + 1] ?? "") && !src.slice(start, end).includes("\n\n");
}

function blockRule(state, startLine, endLine, silent) {
  const lineAt = (line) => state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);
  const first = lineAt(startLine);
  const found = DELIMITERS.find(([open, , display]) => display && first.startsWith(open));
  if (!found) return false;
  const [open, close] = found;
  const lines = [first.slice(open.length)];
  let line = startLine;
  while (!lines.at(-1).trimEnd().endsWith(close)) {
    line++;
    if (line >= endLine) break; // still open: while it streams, it is a formula that is not done
    lines.push(lineAt(line));
  }
  const whole = lines.join("\n").trimEnd();
  const closed = whole.endsWith(close);
  const content = closed ? whole.slice(0, -close.length) : whole;
  if (content.includes(close)) return false; // text follows on the line: the inline rule finds it
  if (silent) return true;
  Object.assign(state.push("math_block", "", 0), { content, block: true, map: [startLine, line + 1], meta: { closed } });
  state.line = line + 1;
  return true;
}
