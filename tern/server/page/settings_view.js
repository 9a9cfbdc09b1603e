// The panel of settings: system prompt, thinking, sampling, tools, key, looks. Knows fields; `page` keeps what they say.

import { el, iconButton } from "./dom.js";
import { FIELDS, readNumber } from "./settings.js";
import { LANGUAGES, t } from "./texts.js";
import { ToolsView } from "./tools_view.js";

/** The panel inside `dialog`. `page`: preferences, current conversation, and what to do when one of them changed. */
export class SettingsView {
  constructor(dialog, page) {
    Object.assign(this, { dialog, page });
    this.tools = new ToolsView(page);
    dialog.addEventListener("close", () => page.settingsClosed());
  }

  /** Make the panel anew, in the language and for the conversation of now. */
  render() {
    this.dialog.replaceChildren(
      el("div", { class: "panel-head" }, el("h2", { text: t("settings") }), iconButton("close", t("close"), () => this.dialog.close())),
      el("div", { class: "panel-body" }, this.#system(), this.#thinking(), this.#sampling(), this.tools.render(), this.#looks(), this.#key()));
  }

  #system() {
    const box = el("textarea", {
      id: "system", rows: 3, value: this.page.conversation.system, placeholder: t("systemHint"),
      on: { input: () => this.page.setSystem(box.value) },
    });
    return section(t("systemPrompt"), el("label", { class: "unseen", for: "system", text: t("systemPrompt") }), box);
  }

  #thinking() {
    const { settings } = this.page.preferences;
    const box = el("input", { type: "checkbox", checked: settings.thinking, on: { change: () => this.page.setSetting("thinking", box.checked) } });
    const budget = this.#number(FIELDS.find((field) => field.name === "thinking_budget"), t("thinkingBudget"), t("unlimited"));
    return section(t("thinking"), el("label", { class: "check" }, box, t("thinkingOn")), budget);
  }

  #sampling() {
    const fields = FIELDS.filter((field) => field.name !== "thinking_budget").map((field) => this.#number(field, t(field.name), t("default")));
    return section(t("sampling"), el("div", { class: "grid" }, ...fields));
  }

  #number(field, label, hint) {
    const wrong = el("p", { class: "wrong", id: `wrong-${field.name}`, role: "alert" });
    const value = this.page.preferences.settings[field.name];
    const box = el("input", {
      id: `set-${field.name}`, inputMode: field.whole ? "numeric" : "decimal", autocomplete: "off", placeholder: hint,
      value: value === null ? "" : String(value), "aria-describedby": wrong.id,
    });
    box.addEventListener("input", () => {
      try {
        this.page.setSetting(field.name, readNumber(field, box.value, label));
        wrong.textContent = "";
        box.removeAttribute("aria-invalid");
      } catch (error) {
        wrong.textContent = error.message;
        box.setAttribute("aria-invalid", "true");
      }
    });
    return el("div", { class: "field" }, el("label", { for: box.id, text: label }), box, wrong);
  }

  #looks() {
    const { theme, language } = this.page.preferences;
    const themes = select("theme", t("theme"), ["system", "light", "dark"].map((name) => [name, t(name)]), theme, this.page.setTheme);
    const names = Object.entries(LANGUAGES).map(([code, [name]]) => [code, name]);
    const languages = select("language", t("language"), [["", t("system")], ...names], language ?? "", (code) => this.page.setLanguage(code || null));
    return section(t("appearance"), el("div", { class: "grid" }, themes, languages));
  }

  #key() {
    return section(t("apiKey"), keyForm((key, remember) => this.page.setKey(key, remember)));
  }
}

/** Where an API key is typed. */
export function keyForm(use) {
  const box = el("input", { type: "password", autocomplete: "current-password", "aria-label": t("apiKey") });
  const remember = el("input", { type: "checkbox" });
  const submit = (event) => {
    event.preventDefault();
    use(box.value.trim() || null, remember.checked);
  };
  return el("form", { class: "key-form", on: { submit } }, box, el("label", { class: "check" }, remember, t("apiKeyRemember")),
    el("button", { type: "submit", class: "small", text: t("apiKeySave") }));
}

export function section(title, ...children) {
  return el("section", { class: "group" }, el("h3", { text: title }), ...children);
}

function select(id, label, options, value, choose) {
  const box = el("select", { id, on: { change: () => choose(box.value) } }, ...options.map(([code, text]) => el("option", { value: code, text })));
  box.value = value;
  return el("div", { class: "field" }, el("label", { for: id, text: label }), box);
}
