// The current conversation on the page: its messages in order, kept at the end while they grow. Knows views; asks no server.

import { awaitsAnswer, openCalls } from "./conversation.js";
import { byId, el, icon } from "./dom.js";
import { AnswerView, UserView } from "./message_view.js";
import { count, t } from "./texts.js";

const NEAR = 60; // pixels from the end that still count as at the end

const EXAMPLES = [
  { key: "exampleSum", note: "exampleSumNote", tool: null },
  { key: "exampleClock", note: "exampleClockNote", tool: "clock" },
  { key: "exampleWeather", note: "exampleWeatherNote", tool: "get_weather" },
  { key: "exampleIntro", note: "exampleIntroNote", tool: null },
];

/** Shows one conversation at a time. `actions` as in message_view.js, and `example` and `goOn`. */
export class Thread {
  #views = new Map();
  #atEnd = true;
  #top = 0;

  constructor(actions) {
    this.actions = actions;
    this.element = byId("messages");
    this.latest = byId("latest");
    this.element.addEventListener("scroll", () => this.#scrolled());
    this.latest.addEventListener("click", () => this.#toEnd("smooth"));
    new ResizeObserver(() => this.#follow()).observe(this.element);
  }

  /** Show a conversation from its beginning; `live` is the message that is still being written. */
  open(conversation, model, live = null) {
    this.conversation = conversation;
    this.#views.clear();
    this.column = el("div", { class: "column" });
    this.element.replaceChildren(this.column);
    new ResizeObserver(() => this.#follow()).observe(this.column);
    if (conversation.messages.length === 0) this.column.append(this.#welcome(model));
    for (const message of conversation.messages) this.add(message, message === live);
    this.settle(live !== null);
    this.#toEnd("instant");
  }

  /** A message came to the end of the conversation. */
  add(message, live) {
    this.column.querySelector(".welcome")?.remove();
    if (message.role === "tool") {
      for (const view of this.#views.values()) view.settle?.(message);
      return;
    }
    const view = message.role === "user" ? new UserView(message, this.actions) : new AnswerView(message, this.actions);
    this.#views.set(message, view);
    this.column.append(view.element);
    view.show?.(live);
    if (message.role === "user") this.#toEnd("instant");
  }

  grow(message) {
    this.#views.get(message)?.grow();
  }

  /** A message has all of its text. */
  end(message) {
    this.#views.get(message)?.show(false);
  }

  tick(message) {
    this.#views.get(message)?.tick();
  }

  /** Show what the conversation waits for, unless an answer is `running`. */
  settle(running) {
    this.column.querySelector(".go-on")?.remove();
    const waiting = openCalls(this.conversation);
    if (running) return;
    if (waiting.length) this.#views.get(this.conversation.messages.findLast((each) => each.role === "assistant")).ask(waiting);
    else if (awaitsAnswer(this.conversation)) {
      this.column.append(el("div", { class: "go-on" }, el("button", { type: "button", class: "small primary", text: t("continueRun"), on: { click: this.actions.goOn } })));
    }
  }

  /** Begin to edit the user's last message. */
  editLast() {
    const message = this.conversation.messages.findLast((each) => each.role === "user");
    this.#views.get(message)?.edit();
  }

  #welcome(model) {
    const cards = EXAMPLES.map(({ key, note, tool }) => el("button", { type: "button", class: "example", on: { click: () => this.actions.example(t(key), tool) } },
      el("span", { text: t(key) }), el("small", { text: t(note) })));
    const mark = icon("tern");
    mark.classList.add("mark");
    return el("div", { class: "welcome" }, mark, el("h2", { text: t("welcome", { model: model ?? "Tern" }) }), el("p", { text: t("welcomeNote") }), el("div", { class: "examples" }, ...cards));
  }

  /** Only who scrolls up leaves the end: text that came since the last scrolling does not mean that. */
  #scrolled() {
    const { scrollTop, clientHeight, scrollHeight } = this.element;
    const near = scrollHeight - scrollTop - clientHeight < NEAR;
    if (near || scrollTop < this.#top) this.#atEnd = near;
    this.#top = scrollTop;
    this.latest.hidden = this.#atEnd;
  }

  #follow() {
    if (this.#atEnd) this.#toEnd("instant");
  }

  #toEnd(behavior) {
    this.#atEnd = true;
    this.latest.hidden = true;
    this.element.scrollTo({ top: this.element.scrollHeight, behavior });
  }
}

/** How much of the model's length the conversation takes, as its last answer counted. */
export function contextUse(conversation, length) {
  const stats = conversation.messages.findLast((each) => each.role === "assistant" && each.stats.prompt)?.stats;
  if (!stats || !length) return null;
  const used = stats.prompt + (stats.completion ?? 0);
  return { short: `${count(used)} / ${count(length)}`, long: t("contextUse", { used: count(used), all: count(length) }) };
}
