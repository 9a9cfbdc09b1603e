// One message on the page: the user's with an editor, the model's with thought, answer, calls, counts and actions.
// Knows how a message looks; what its buttons do is `actions`: edit, again, retry, result.

import { speed } from "./answer.js";
import { CallCard } from "./call_card.js";
import { el, iconButton } from "./dom.js";
import { GrowingMarkdown } from "./growing.js";
import { copyButton } from "./markdown.js";
import { count, seconds, t } from "./texts.js";
import { ThoughtView } from "./thought.js";

/** A user's message; editing it sends it anew and drops what followed. */
export class UserView {
  constructor(message, actions) {
    Object.assign(this, { message, actions });
    this.text = el("div", { class: "user-text", text: message.content });
    this.bar = el("div", { class: "message-actions" },
      copyButton(() => message.content, t("copyMessage")), iconButton("pencil", t("edit"), () => this.edit(), { class: "icon-button edit" }));
    this.element = el("article", { class: "message user", "aria-label": t("you") }, this.text, this.bar);
  }

  /** Turn the message into a field. */
  edit() {
    const box = el("textarea", { value: this.message.content, rows: Math.min(12, this.message.content.split("\n").length + 1), "aria-label": t("edit") });
    const leave = () => {
      form.replaceWith(this.text);
      this.bar.hidden = false;
      this.bar.querySelector(".edit").focus();
    };
    const send = () => box.value.trim() && this.actions.edit(this.message, box.value);
    const form = el("div", { class: "editor" }, box, el("div", { class: "row end" },
      el("button", { type: "button", class: "small", text: t("cancel"), on: { click: leave } }),
      el("button", { type: "button", class: "small primary", text: t("saveAndSend"), on: { click: send } })));
    box.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") leave();
      else if (event.key === "Enter" && !event.shiftKey) send();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.text.replaceWith(form);
    this.bar.hidden = true;
    box.focus();
  }
}

/** The model's message, from its first token to its last. */
export class AnswerView {
  #thought = null;
  #markdown = null;
  #cards = new Map();
  #frame = null;

  constructor(message, actions) {
    Object.assign(this, { message, actions });
    this.body = el("div", { class: "answer-body" });
    this.calls = el("div", { class: "calls" });
    this.foot = el("div", { class: "message-foot" });
    this.waiting = el("p", { class: "waiting", text: t("waiting") });
    this.thoughtPlace = el("div");
    this.element = el("article", { class: "message answer", "aria-label": t("model") }, this.thoughtPlace, this.body, this.calls, this.foot);
  }

  /** Show the message while it grows: once a frame, however many tokens came. */
  grow() {
    this.#frame ??= requestAnimationFrame(() => {
      this.#frame = null;
      this.show(true);
    });
  }

  /** Show the message as it is; with `live`, more is to come. */
  show(live) {
    if (!live && this.#frame !== null) cancelAnimationFrame(this.#frame);
    const { message } = this;
    this.element.setAttribute("aria-busy", String(live));
    if (message.reasoning) this.#showThought(live);
    if (message.content) this.#showContent(live);
    for (const call of message.calls) this.#card(call).grow();
    this.#showFoot(live);
  }

  /** Once a second while the answer is written. */
  tick() {
    this.#thought?.tick(this.message.stats);
  }

  /** A result came for one of the calls. */
  settle(result) {
    this.#cards.get(result.id)?.settle(result);
  }

  /** The user has to give these calls' results. */
  ask(calls) {
    for (const call of calls) this.#card(call).ask();
  }

  #showThought(live) {
    if (!this.#thought) {
      this.#thought = new ThoughtView();
      this.thoughtPlace.append(this.#thought.element);
    }
    this.#thought.show(this.message, live);
  }

  #showContent(live) {
    this.#markdown ??= new GrowingMarkdown(this.body);
    if (live) this.#markdown.show(this.message.content);
    else this.#markdown.finish(this.message.content);
  }

  #card(call) {
    let card = this.#cards.get(call.id);
    if (!card) {
      card = new CallCard(call, this.actions.result);
      this.#cards.set(call.id, card);
      this.calls.append(card.element);
    }
    return card;
  }

  #showFoot(live) {
    const { message } = this;
    const begun = message.content || message.reasoning || message.calls.length;
    const counts = el("span", { class: "counts", text: countsOf(message.stats).join(" · ") });
    if (live) {
      this.foot.replaceChildren(...(begun ? [] : [this.waiting]), counts);
      return;
    }
    const trouble = message.error ? this.#error() : this.#note();
    const actions = el("div", { class: "message-actions" },
      ...(message.content ? [copyButton(() => message.content, t("copyMessage"))] : []),
      iconButton("again", t("again"), () => this.actions.again(message)));
    this.foot.replaceChildren(...(trouble ? [trouble] : []), el("div", { class: "row" }, actions, counts));
  }

  #error() {
    const { key, message, retryAfter } = this.message.error;
    const wait = retryAfter ? ` ${t("queueRetry", { seconds: retryAfter })}` : "";
    return el("div", { class: "trouble", role: "alert" }, el("p", { text: (key ? t(key) : message) + wait }),
      el("button", { type: "button", class: "small", text: t("retry"), on: { click: () => this.actions.again(this.message) } }));
  }

  #note() {
    const { finish, content, calls } = this.message;
    const empty = !content && calls.length === 0;
    if (finish === "length") return el("p", { class: "note", text: t(empty ? "emptyLength" : "length") });
    if (finish === "stopped") return el("p", { class: "note", text: t("stopped") });
    return empty ? el("p", { class: "note", text: t("empty") }) : null;
  }
}

/** The counters under an answer, as far as they are known. */
function countsOf(stats) {
  const rate = speed(stats);
  return [
    stats.completion ? t("tokens", { count: count(stats.completion) }) : null,
    rate ? t("speed", { count: rate < 100 ? rate.toFixed(1) : count(Math.round(rate)) }) : null,
    stats.first ? t("firstToken", { seconds: ((stats.first - stats.start) / 1000).toFixed(2) }) : null,
    stats.prompt ? t("prompt", { count: count(stats.prompt) }) + (stats.cached ? ` (${t("cached", { count: count(stats.cached) })})` : "") : null,
  ].filter(Boolean);
}
