// The keyboard: which keys do what, and the list of them. Knows keys; `page` knows what is to be done.

import { byId, el, iconButton } from "./dom.js";
import { t } from "./texts.js";

const LIST = [
  ["Enter", "keySend"], ["Shift + Enter", "keyLine"], ["Esc", "keyStop"], ["↑", "keyEdit"], ["/", "keyCompose"], ["Ctrl + K", "keySearch"],
  ["Alt + N", "keyNew"], ["Alt + S", "keySettings"], ["?", "keyHelp"],
];

/** Show the list of shortcuts. */
export function showKeys() {
  const dialog = byId("keys");
  const rows = LIST.flatMap(([keys, key]) => [el("dt", {}, ...keys.split(" + ").map((name) => el("kbd", { text: name }))), el("dd", { text: t(key) })]);
  dialog.replaceChildren(
    el("div", { class: "panel-head" }, el("h2", { text: t("keys") }), iconButton("close", t("close"), () => dialog.close())), el("dl", {}, ...rows));
  dialog.showModal();
}

/** Listen to the page's shortcuts. */
export function listenToKeys(page) {
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.defaultPrevented) return;
    const action = actionOf(event, page);
    if (!action) return;
    event.preventDefault();
    action();
  });
}

function actionOf(event, page) {
  const { key, code, altKey } = event;
  const control = event.ctrlKey || event.metaKey;
  if (key === "Escape") return page.escape();
  if (control && !altKey && key.toLowerCase() === "k") return page.search;
  if (altKey && !control && code === "KeyN") return page.startNew; // `code`: with Alt held, a Mac's key is another letter
  if (altKey && !control && code === "KeyS") return page.toggleSettings;
  if (control || altKey || event.target.closest("input, textarea, select")) return null;
  if (key === "/") return () => byId("prompt").focus();
  return key === "?" ? showKeys : null;
}
