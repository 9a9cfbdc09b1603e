// Model's text -> elements. The text is untrusted: markup in it is text, what markdown-it writes goes through DOMPurify,
// links lead only to the web and to mail, pictures are links. Code is coloured and formulas are drawn afterwards, with
// libraries that are loaded when there is first something for them to do.

import { el, iconButton } from "./dom.js";
import { mathRules } from "./math.js";
import { t } from "./texts.js";
import DOMPurify from "./vendor/dompurify/purify.es.mjs";
import MarkdownIt from "./vendor/markdown-it/markdown-it.esm.min.mjs";

const LANGUAGES = [
  "bash", "c", "cpp", "css", "diff", "go", "java", "javascript", "json", "markdown", "python", "rust", "sql", "typescript", "xml", "yaml",
];
const SAFE_LINK = /^(?:https?:|mailto:)/i;
const MAX_COLOURED = 60_000; // characters of code; longer listings stay plain

// Both write style attributes into the formula's MathML, which the page's policy forbids.
const MACROS = { "\\pmb": "\\boldsymbol{#1}", "\\fcolorbox": "\\colorbox{#2}{#3}" };

const CLEAN = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "div", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s", "span",
    "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["class", "href", "start", "title"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

export const md = new MarkdownIt({ html: false, linkify: true }).use(mathRules);
md.linkify.set({ fuzzyLink: false, fuzzyEmail: false }); // main.py is a file, not a site in Paraguay
md.validateLink = (url) => SAFE_LINK.test(url.trim());
Object.assign(md.renderer.rules, {
  math_inline: (tokens, at) => formula("span", tokens[at], tokens[at].meta.display),
  math_block: (tokens, at) => formula("div", tokens[at], true),
  image: (tokens, at) => link(tokens[at].attrGet("src"), tokens[at].content),
  heading_open: (tokens, at) => `<${lower(tokens[at].tag)}>`,
  heading_close: (tokens, at) => `</${lower(tokens[at].tag)}>`,
  th_open: (tokens, at) => cell(tokens[at]),
  td_open: (tokens, at) => cell(tokens[at]),
});

const escape = (text) => md.utils.escapeHtml(text);
const formula = (tag, token, display) => `<${tag} class="math${display ? " display" : ""}">${escape(token.content.trim())}</${tag}>`;
const link = (url, text) => (url && md.validateLink(url) ? `<a href="${escape(url)}">${escape(text || url)}</a>` : escape(text));
const lower = (tag) => `h${Math.min(6, Number(tag[1]) + 2)}`; // the page's own headings are h1 and h2
const cell = (token) => {
  const align = /text-align:(\w+)/.exec(token.attrGet("style") ?? "")?.[1]; // style attributes are against the policy
  return align ? `<${token.tag} class="${align}">` : `<${token.tag}>`;
};

/** Tokens of markdown-it as a fragment. With `live`, text is still being added: long code is not coloured yet. */
export function renderTokens(tokens, env, { live = false } = {}) {
  const fragment = DOMPurify.sanitize(md.renderer.render(tokens, md.options, env), CLEAN);
  for (const anchor of fragment.querySelectorAll("a")) {
    if (!SAFE_LINK.test(anchor.getAttribute("href") ?? "")) anchor.removeAttribute("href");
    Object.assign(anchor, { rel: "noopener noreferrer nofollow", target: "_blank" });
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = scrolling("div", t("table"), "table-frame");
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const code of fragment.querySelectorAll("pre > code")) dressCode(code, live);
  for (const place of fragment.querySelectorAll(".math")) drawFormula(place);
  return fragment;
}

/** Something wider than the page, which the keyboard can scroll. */
function scrolling(tag, label, name) {
  return el(tag, { class: name, tabIndex: 0, role: "region", "aria-label": label });
}

/** A listing with its language and a button that copies it. */
function dressCode(code, live) {
  const language = /language-(\S+)/.exec(code.className)?.[1] ?? "";
  const pre = code.parentElement;
  const listing = scrolling("pre", language ? `${t("code")}: ${language}` : t("code"), "");
  const frame = el("div", { class: "code" },
    el("div", { class: "code-head" }, el("span", { text: language || t("code") }), copyButton(() => code.textContent)), listing);
  pre.replaceWith(frame);
  listing.append(code);
  if (code.textContent.length <= (live ? MAX_COLOURED / 10 : MAX_COLOURED)) colour(code, language);
}

/** A button that copies what `text()` gives and says so. */
export function copyButton(text, label = t("copy")) {
  const button = iconButton("copy", label, async () => {
    await navigator.clipboard.writeText(text());
    button.classList.add("done");
    button.setAttribute("aria-label", t("copied"));
    button.querySelector("use").setAttribute("href", button.querySelector("use").getAttribute("href").replace("#copy", "#check"));
    setTimeout(() => button.replaceWith(copyButton(text, label)), 1500);
  });
  return button;
}

let highlighter = null;

async function loadHighlighter() {
  const vendored = (path) => import(`./vendor/highlight.js/${path}`);
  const [{ default: hljs }, ...grammars] = await Promise.all([
    vendored("core.min.js"), ...LANGUAGES.map((name) => vendored(`languages/${name}.min.js`)),
  ]);
  LANGUAGES.forEach((name, at) => hljs.registerLanguage(name, grammars[at].default));
  return hljs;
}

async function colour(code, language) {
  if (language === "") return;
  highlighter ??= loadHighlighter();
  const hljs = await highlighter;
  if (!hljs.getLanguage(language)) return;
  const { value } = hljs.highlight(code.textContent, { language, ignoreIllegals: true });
  code.replaceChildren(DOMPurify.sanitize(value, CLEAN));
}

let katex = null;

async function loadKatex() {
  const sheet = el("link", { rel: "stylesheet", href: new URL("vendor/katex/katex.min.css", import.meta.url).href });
  document.head.append(sheet);
  return (await import("./vendor/katex/katex.mjs")).default;
}

async function drawFormula(place) {
  const tex = place.textContent;
  katex ??= loadKatex();
  const library = await katex;
  const display = place.classList.contains("display");
  try {
    library.render(tex, place, { displayMode: display, throwOnError: true, strict: "ignore", trust: false, maxSize: 20, maxExpand: 500, macros: { ...MACROS } });
    if (display) Object.assign(place, { tabIndex: 0 });
  } catch {
    place.replaceChildren(el("code", { text: tex })); // not TeX that KaTeX reads, or not all of it yet
  }
}
