// A thought: a small window onto its end while it grows, with seconds and tokens; afterwards folded away.

import { el, icon } from "./dom.js";
import { GrowingText } from "./growing.js";
import { count, seconds, t } from "./texts.js";

/** The thought of one answer. */
export class ThoughtView {
  #live = false;
  #touched = false;

  constructor() {
    this.label = el("span", { class: "thought-label" });
    this.counts = el("span", { class: "thought-counts" });
    this.body = el("div", { class: "thought-body", tabIndex: 0, role: "region", "aria-label": t("thought") });
    this.text = new GrowingText(this.body);
    const summary = el("summary", { on: { click: () => (this.#touched = true) } }, icon("chevron"), this.label, this.counts);
    this.element = el("details", { class: "thought" }, summary, this.body);
  }

  /** Show an answer's thought; `live` while the answer is being written. */
  show({ reasoning, stats }, live) {
    const thinking = live && stats.thoughtEnd === undefined;
    if (thinking !== this.#live && !this.#touched) this.element.open = thinking;
    this.#live = thinking;
    this.element.classList.toggle("live", thinking);
    if (live) this.text.show(reasoning);
    else this.text.finish(reasoning);
    this.#label(stats, thinking);
  }

  /** The seconds go on while no token comes. */
  tick(stats) {
    if (this.#live) this.#label(stats, true);
  }

  #label({ thoughtStart, thoughtEnd, thought }, thinking) {
    const time = seconds(Math.max(0, (thoughtEnd ?? (thinking ? Date.now() : thoughtStart)) - thoughtStart) || 0);
    this.label.textContent = thinking ? t("thinkingNow") : t("thoughtFor", { seconds: time });
    const parts = [thinking ? t("seconds", { seconds: time }) : null, thought ? t("tokens", { count: count(thought) }) : null];
    this.counts.textContent = parts.filter(Boolean).join(" · ");
  }
}
