// The list of conversations: choose, rename, delete, search. Knows titles; `page` knows what is to be done.

import { mentions } from "./conversation.js";
import { byId, el, iconButton } from "./dom.js";
import { t } from "./texts.js";

/** The list in the page's sidebar. */
export class Sidebar {
  constructor(page) {
    this.page = page;
    this.list = byId("conversations");
    this.search = byId("search");
    this.search.addEventListener("input", () => this.render());
  }

  render() {
    const words = this.search.value;
    const found = this.page.conversations.filter((each) => !words.trim() || mentions(each, words));
    const none = this.page.conversations.length ? "noMatch" : "noConversations";
    this.list.replaceChildren(...(found.length ? found.map((each) => this.#row(each)) : [el("li", { class: "none", text: t(none) })]));
  }

  #row(conversation) {
    const title = conversation.title || t("untitled");
    const current = conversation === this.page.conversation;
    const row = el("li", { class: current ? "current" : "" },
      el("button", { type: "button", class: "open", text: title, title, "aria-current": current ? "true" : undefined, on: { click: () => (current ? this.page.stay() : this.page.open(conversation)), dblclick: () => this.#rename(row, conversation) } }),
      iconButton("pencil", t("rename", { title }), () => this.#rename(row, conversation)),
      iconButton("trash", t("delete", { title }), () => this.page.remove(conversation)));
    return row;
  }

  #rename(row, conversation) {
    const box = el("input", { value: conversation.title, "aria-label": t("title"), maxLength: 200 });
    let done = false;
    const leave = (keep) => {
      if (done) return; // taking the field away takes its focus away too
      done = true;
      if (keep && box.value.trim()) this.page.rename(conversation, box.value.trim());
      else this.render();
    };
    box.addEventListener("blur", () => leave(true));
    box.addEventListener("keydown", (event) => {
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      event.stopPropagation();
      leave(event.key === "Enter");
      this.list.querySelector(".current .open")?.focus();
    });
    row.replaceChildren(box);
    box.select();
  }
}
