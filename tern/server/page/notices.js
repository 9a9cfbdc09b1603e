// Sentences above the message box: what happened, and a way on. Knows a place; knows nothing of reasons.

import { byId, el, iconButton } from "./dom.js";
import { t } from "./texts.js";

const STAYS = 8000; // milliseconds that a notice with nothing to decide stays

/** Show a sentence; `action` is `{label, run}`. With `stays`, until it is closed. Returns what takes it away. */
export function notice(text, { action = null, stays = false, form = null } = {}) {
  const leave = () => element.remove();
  const button = action && el("button", { type: "button", class: "small", text: action.label, on: { click: () => (leave(), action.run()) } });
  const element = el("div", { class: "notice", role: "status" }, el("span", { text }), form, button, iconButton("close", t("close"), leave));
  byId("notices").append(element);
  if (!stays) setTimeout(leave, STAYS);
  return leave;
}

/** Read a text out, once, to those who listen to the page. */
export function say(text) {
  byId("said").textContent = text;
}

/** Hand a text to the user as a file. */
export function saveFile(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
