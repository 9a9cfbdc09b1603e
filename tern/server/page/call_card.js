// A tool call as a card: name, arguments, and its result or the field that asks for it. Knows calls; runs none.

import { el, icon } from "./dom.js";
import { t } from "./texts.js";

const SHORT = 60; // characters of JSON that read well on one line

/** JSON as it reads best where it is JSON, else the text as it is. */
function pretty(text) {
  try {
    const value = JSON.parse(text);
    const short = JSON.stringify(value, null, 1).replace(/\n\s*/g, " ");
    return short.length <= SHORT ? short : JSON.stringify(value, null, 2);
  } catch {
    return text;
  }
}

/** The card of one call. `onResult(call, text)` is called once, with what the user typed. */
export class CallCard {
  constructor(call, onResult) {
    this.call = call;
    this.onResult = onResult;
    this.name = el("span", { class: "call-name" });
    this.state = el("span", { class: "call-state" });
    this.arguments = el("code");
    this.answer = el("div", { class: "call-answer" });
    this.element = el("section", { class: "call", "aria-label": t("call") },
      el("div", { class: "call-head" }, icon("tool"), this.name, this.state),
      el("pre", { class: "call-arguments", tabIndex: 0, role: "region", "aria-label": t("arguments") }, this.arguments), this.answer);
    this.grow();
  }

  /** Show what has come of the call so far. */
  grow() {
    this.name.textContent = this.call.name;
    this.element.setAttribute("aria-label", `${t("call")}: ${this.call.name}`);
    this.arguments.textContent = pretty(this.call.arguments);
  }

  /** Show the result. `source` says who gave it. */
  settle({ content, source }) {
    this.state.textContent = t(source === "page" ? "page" : source === "mock" ? "mock" : "typed");
    this.element.classList.add("settled");
    this.answer.replaceChildren(
      el("div", { class: "call-label", text: t("result") }),
      el("pre", { class: "call-result", tabIndex: 0, role: "region", "aria-label": t("result") }, el("code", { text: pretty(content) })));
  }

  /** Ask the user for the result. */
  ask() {
    if (this.answer.childElementCount) return;
    this.state.textContent = t("yourResult");
    const label = t("resultAsk", { name: this.call.name });
    const box = el("textarea", { rows: 2, placeholder: t("resultHint"), "aria-label": label, spellcheck: false });
    const send = () => this.onResult(this.call, box.value);
    box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      send();
    });
    this.answer.replaceChildren(box, el("button", { type: "button", class: "small primary", text: t("sendResult"), on: { click: send } }));
    box.focus({ preventScroll: true });
  }
}
