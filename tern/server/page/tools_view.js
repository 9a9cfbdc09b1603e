// The tools of the settings' panel: which are offered, and the editor of the user's own. Knows fields; runs no tool.

import { el, iconButton } from "./dom.js";
import { t } from "./texts.js";
import { DEMO_TOOLS, EXAMPLE_TOOL, nameOf, readTool } from "./tools.js";

/** The list of tools and the editor of one. */
export class ToolsView {
  constructor(page) {
    this.page = page;
    this.element = el("section", { class: "group", id: "tools" });
  }

  render() {
    const { tools } = this.page.preferences;
    const own = tools.map((tool) => this.#row(tool,
      iconButton("pencil", t("editTool", { name: nameOf(tool) }), () => this.#edit(tool)),
      iconButton("trash", t("deleteTool", { name: nameOf(tool) }), () => this.#remove(tool))));
    const add = el("button", { type: "button", class: "small", id: "new-tool", text: t("newTool"), on: { click: () => this.#edit(null) } });
    this.element.replaceChildren(el("h3", { text: t("tools") }), el("ul", { class: "tool-list" }, ...DEMO_TOOLS.map((tool) => this.#row(tool)), ...own), add);
    return this.element;
  }

  #row(tool, ...buttons) {
    const name = nameOf(tool);
    const box = el("input", { type: "checkbox", checked: this.page.preferences.enabledTools.includes(name), on: { change: () => this.page.enableTool(name, box.checked) } });
    const { description } = tool.definition.function;
    return el("li", {}, el("label", { class: "check" }, box, el("span", {}, el("b", { text: name }), el("small", { text: description ?? "" }))), ...buttons);
  }

  #remove(tool) {
    this.page.enableTool(nameOf(tool), false);
    this.page.setTools(this.page.preferences.tools.filter((each) => each !== tool));
    this.render();
  }

  #edit(tool) {
    const definition = el("textarea", { id: "tool-definition", rows: 10, class: "mono", spellcheck: false, value: JSON.stringify((tool?.definition ?? EXAMPLE_TOOL).function, null, 2) });
    const mock = el("textarea", { id: "tool-mock", rows: 2, class: "mono", spellcheck: false, placeholder: t("mockHint"), value: tool?.mock ?? "" });
    const wrong = el("p", { class: "wrong", role: "alert" });
    const save = () => {
      try {
        this.#keep(tool, { definition: readTool(definition.value, this.#taken(tool)), mock: mock.value.trim() });
      } catch (error) {
        wrong.textContent = t(error.key, { detail: error.message });
      }
    };
    const form = el("div", { class: "tool-editor" },
      el("label", { for: definition.id, text: t("toolDefinition") }), definition, el("label", { for: mock.id, text: t("mock") }), mock, wrong,
      el("div", { class: "row end" }, el("button", { type: "button", class: "small", text: t("cancel"), on: { click: () => this.render() } }),
        el("button", { type: "button", class: "small primary", id: "save-tool", text: t("save"), on: { click: save } })));
    this.element.lastElementChild.replaceWith(form);
    definition.focus();
  }

  #taken(tool) {
    return [...DEMO_TOOLS, ...this.page.preferences.tools].filter((each) => each !== tool).map(nameOf);
  }

  #keep(tool, made) {
    const { tools } = this.page.preferences;
    if (tool) this.page.enableTool(nameOf(tool), false);
    this.page.setTools(tool ? tools.map((each) => (each === tool ? made : each)) : [...tools, made]);
    this.page.enableTool(nameOf(made), true);
    this.render();
    this.element.querySelector("#new-tool").focus();
  }
}
