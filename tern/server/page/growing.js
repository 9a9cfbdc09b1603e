// Shows text while it grows. Knows elements and frames; knows not where the text comes from.
//
// Only the last two blocks of Markdown can still change (the last one is being written, and may turn out to belong to the
// one before it, as the 2 of a list's second item does): what stands before them is rendered once and left alone, so that
// an answer of any length costs each frame no more than those two do.

import { md, renderTokens } from "./markdown.js";

/** At most this share of the time goes into rendering, so that blocks that are long themselves leave the page alive. */
const SHARE = 0.25;

/** Markdown that grows. `text` always begins with what was shown before. */
export class GrowingMarkdown {
  #text = "";
  #settled = 0; // characters before the last two blocks
  #env = {};
  #last = [];
  #frame = null;
  #earliest = 0;

  constructor(element) {
    this.element = element;
  }

  /** Show more of the text, in one of the next frames. */
  show(text) {
    this.#text = text;
    this.#frame ??= requestAnimationFrame((now) => this.#tick(now));
  }

  /** Show all of the text now; nothing comes after it. */
  finish(text) {
    if (this.#frame !== null) cancelAnimationFrame(this.#frame);
    this.#frame = null;
    this.#text = text;
    this.#render(false);
  }

  #tick(now) {
    this.#frame = null;
    if (now < this.#earliest) {
      this.show(this.#text);
      return;
    }
    const begun = performance.now();
    this.#render(true);
    const spent = performance.now() - begun;
    this.#earliest = begun + spent / SHARE;
  }

  #render(live) {
    const tail = this.#text.slice(this.#settled);
    const tokens = md.parse(tail, this.#env);
    const at = live ? lastBlocks(tokens) : tokens.length;
    const settled = renderTokens(tokens.slice(0, at), this.#env);
    const last = renderTokens(tokens.slice(at), this.#env, { live: true });
    for (const node of this.#last) node.remove();
    this.#last = [...last.childNodes];
    this.element.append(settled, last);
    if (live && at > 0) this.#settled += offsetOfLine(tail, tokens[at].map[0]);
  }
}

/** Where the last two blocks begin among the tokens. */
function lastBlocks(tokens) {
  const starts = tokens.flatMap((token, at) => (token.level === 0 && token.nesting >= 0 ? [at] : []));
  return starts.at(-2) ?? 0;
}

function offsetOfLine(text, line) {
  let offset = 0;
  for (let passed = 0; passed < line; passed++) offset = text.indexOf("\n", offset) + 1;
  return offset;
}

/** Plain text that grows at the end of `element`, by what is new alone. */
export class GrowingText {
  #node = document.createTextNode("");
  #pending = "";
  #frame = null;

  constructor(element) {
    this.element = element;
    element.append(this.#node);
  }

  /** Show all of `text`, in the next frame. */
  show(text) {
    this.#pending = text;
    this.#frame ??= requestAnimationFrame(() => {
      this.#frame = null;
      this.finish(this.#pending);
    });
  }

  /** Show all of `text` now. */
  finish(text) {
    this.#node.appendData(text.slice(this.#node.length));
    this.element.scrollTop = this.element.scrollHeight;
  }
}
