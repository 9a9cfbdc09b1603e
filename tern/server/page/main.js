// The page: what the user does becomes turns, and turns become what the user sees. Puts the parts together.

import { servedModel } from "./api.js";
import { awaitsAnswer, fromJson, newConversation, ownTitle, toJson, toMarkdown } from "./conversation.js";
import { byId } from "./dom.js";
import { listenToKeys, showKeys } from "./keys.js";
import { notice, saveFile, say } from "./notices.js";
import { SettingsView, keyForm } from "./settings_view.js";
import { Sidebar } from "./sidebar.js";
import { ConversationStore, loadKey, loadPreferences, saveKey, savePreferences } from "./store.js";
import { chooseLanguage, count, fillTexts, t } from "./texts.js";
import { Thread, contextUse } from "./thread.js";
import { DEMO_TOOLS, EXAMPLE_TOOL, nameOf } from "./tools.js";
import { Turn } from "./turn.js";

const SAVE_EVERY = 2000; // milliseconds between savings of an answer that is being written
const WIDE = matchMedia("(min-width: 72rem)"); // room for the settings beside the conversation
const DRAWER = matchMedia("(max-width: 52rem)"); // the list of conversations lies over the page

class Page {
  preferences = loadPreferences();
  apiKey = loadKey();
  model = null;
  turns = new Map(); // conversation -> the turn that runs in it
  #asksForKey = false;

  async start() {
    this.#lookLike();
    this.store = await ConversationStore.open();
    this.conversations = await this.store.all();
    this.sidebar = new Sidebar(this);
    this.thread = new Thread({
      edit: (message, text) => this.#resend(message, text), again: (message) => this.#again(message),
      result: (call, text) => this.#giveResult(call, text), example: (text, tool) => this.#example(text, tool), goOn: () => this.#run(),
    });
    this.settings = new SettingsView(byId("settings"), this);
    this.#listen();
    this.startNew();
    if (!this.store.lasting) notice(t("notKept"), { stays: true });
    setInterval(() => this.#tick(), 500);
    await this.#meetModel();
  }

  // --- what the parts ask of the page ---

  open(conversation) {
    this.conversation = conversation;
    this.#showConversation();
    this.stay();
  }

  /** The current conversation was chosen again. */
  stay() {
    this.#drawer(false);
    byId("prompt").focus();
  }

  startNew = () => {
    this.open(newConversation(Date.now()));
  };

  async remove(conversation) {
    this.turns.get(conversation)?.stop();
    this.conversations = this.conversations.filter((each) => each !== conversation);
    await this.store.remove(conversation.id);
    if (conversation === this.conversation) this.startNew();
    else this.sidebar.render();
    const back = async () => {
      this.conversations.unshift(conversation);
      await this.store.put(conversation);
      this.open(conversation);
    };
    notice(t("deleted"), { action: { label: t("undo"), run: back } });
  }

  rename(conversation, title) {
    Object.assign(conversation, { title, named: true });
    this.#save(conversation);
    this.sidebar.render();
    this.#showBar();
  }

  setSystem(text) {
    this.conversation.system = text;
    if (this.conversation.messages.length) this.#save(this.conversation);
  }

  setSetting(name, value) {
    this.preferences.settings[name] = value;
    this.#keep();
  }

  setTools(tools) {
    this.preferences.tools = tools;
    this.#keep();
  }

  enableTool(name, on) {
    const others = this.preferences.enabledTools.filter((each) => each !== name);
    this.preferences.enabledTools = on ? [...others, name] : others;
    this.#keep();
  }

  setTheme = (theme) => {
    this.preferences.theme = theme;
    this.#keep();
    this.#lookLike();
  };

  setLanguage(language) {
    this.preferences.language = language;
    this.#keep();
    this.#lookLike();
    this.#showConversation();
    byId("language").focus();
  }

  async setKey(key, remember) {
    this.apiKey = key;
    this.#asksForKey = false;
    saveKey(key, remember);
    byId("notices").replaceChildren();
    await this.#meetModel();
    const last = this.conversation.messages.at(-1);
    if (this.model && last?.error?.status === 401) this.#again(last);
  }

  settingsClosed() {
    byId("open-settings").setAttribute("aria-expanded", "false");
    document.body.classList.remove("with-settings");
  }

  toggleSettings = () => {
    const dialog = byId("settings");
    if (dialog.open) {
      dialog.close();
      return;
    }
    this.settings.render();
    if (WIDE.matches) dialog.show();
    else dialog.showModal();
    document.body.classList.toggle("with-settings", WIDE.matches);
    byId("open-settings").setAttribute("aria-expanded", "true");
  };

  search = () => {
    this.#drawer(true);
    byId("search").select();
  };

  /** What Escape does now: stop the answer, else close what is open. */
  escape() {
    if (this.turns.has(this.conversation)) return () => this.turns.get(this.conversation).stop();
    if (byId("settings").open) return () => byId("settings").close();
    if (DRAWER.matches && document.body.classList.contains("with-drawer")) return () => this.#drawer(false);
    return null;
  }

  // --- turns ---

  #send() {
    const box = byId("prompt");
    if (!box.value.trim() || this.turns.has(this.conversation)) return;
    const text = box.value;
    box.value = "";
    this.#fitBox();
    this.#say(text);
  }

  #say(text) {
    const { conversation } = this;
    const message = { role: "user", content: text };
    conversation.messages.push(message);
    if (!this.conversations.includes(conversation)) this.conversations.unshift(conversation);
    this.thread.add(message, false);
    this.#run();
  }

  async #run() {
    const { conversation } = this;
    if (this.turns.has(conversation)) return;
    conversation.updated = Date.now();
    if (!conversation.named) conversation.title = ownTitle(conversation);
    this.conversations.sort((one, other) => other.updated - one.updated);
    const shown = (show) => (message) => conversation === this.conversation && show(message);
    let saved = Date.now();
    const turn = new Turn(conversation, () => this.#options(), {
      added: (message) => (turn.live = message, shown((each) => this.thread.add(each, each.role === "assistant"))(message)),
      grew: (message) => {
        shown((each) => this.thread.grow(each))(message);
        if (Date.now() - saved > SAVE_EVERY) this.#save(conversation, (saved = Date.now()));
      },
      ended: (message) => this.#ended(conversation, message),
    });
    this.turns.set(conversation, turn);
    this.thread.settle(true);
    this.#showBar();
    this.sidebar.render();
    this.#save(conversation);
    try {
      await turn.run();
    } finally {
      const replaced = this.turns.get(conversation) !== turn; // by one that answers again
      if (!replaced) this.turns.delete(conversation);
      this.#save(conversation);
      if (!replaced && conversation === this.conversation) {
        this.thread.settle(false);
        this.#showBar();
      }
    }
  }

  #options() {
    const { settings, tools, enabledTools } = this.preferences;
    const offered = [...DEMO_TOOLS, ...tools].filter((tool) => enabledTools.includes(nameOf(tool)));
    return { settings, tools: offered.map((tool) => tool.definition), userTools: tools, apiKey: this.apiKey };
  }

  #ended(conversation, message) {
    if (message.error?.status === 401) this.#askForKey();
    if (conversation !== this.conversation) return;
    this.thread.end(message);
    this.#showBar();
    if (message.calls.length) say(t("calling", { name: message.calls.map((call) => call.name).join(", ") }));
    else if (message.finish === "stopped") say(t("stopped"));
    else if (message.content) say(t("answered", { text: message.content }));
  }

  #giveResult(call, content) {
    const message = { role: "tool", id: call.id, name: call.name, content, source: "typed" };
    this.conversation.messages.push(message);
    this.thread.add(message, false);
    byId("prompt").focus();
    if (awaitsAnswer(this.conversation)) this.#run();
    else this.thread.settle(false);
  }

  #again(message) {
    this.#cutBefore(message);
    this.#run();
  }

  #resend(message, text) {
    this.#cutBefore(message);
    this.#say(text);
    byId("prompt").focus();
  }

  /** Drop a message and what follows it, with a way back until something else is sent. */
  #cutBefore(message) {
    const { conversation } = this;
    this.turns.get(conversation)?.stop();
    this.turns.delete(conversation);
    const before = [...conversation.messages];
    conversation.messages.length = before.indexOf(message);
    this.#showConversation();
    if (message.error) return;
    const back = () => {
      this.turns.get(conversation)?.stop();
      conversation.messages.splice(0, Infinity, ...before);
      this.#save(conversation);
      this.open(conversation);
    };
    notice(t("replaced"), { action: { label: t("undo"), run: back } });
  }

  #example(text, tool) {
    if (tool === nameOf({ definition: EXAMPLE_TOOL }) && !this.preferences.tools.some((each) => nameOf(each) === tool)) {
      this.setTools([...this.preferences.tools, { definition: EXAMPLE_TOOL, mock: "" }]);
    }
    if (tool) this.enableTool(tool, true);
    this.#say(text);
    byId("prompt").focus();
  }

  // --- the server ---

  async #meetModel() {
    try {
      this.model = await servedModel(this.apiKey);
      if (this.conversation.messages.length === 0) this.#showConversation();
      this.#showBar();
    } catch (error) {
      if (error.status === 401) this.#askForKey();
      else notice(error.key ? t(error.key) : error.message, { stays: true, action: { label: t("retry"), run: () => this.#meetModel() } });
    }
  }

  #askForKey() {
    if (this.#asksForKey) return;
    this.#asksForKey = true;
    const form = keyForm((key, remember) => this.setKey(key, remember));
    notice(t("apiKeyAsk"), { stays: true, form });
    form.querySelector("input").focus();
  }

  // --- what is seen ---

  #showConversation() {
    const live = this.turns.get(this.conversation)?.live ?? null;
    this.thread.open(this.conversation, this.model?.id, live);
    this.#showBar();
    this.sidebar.render();
    if (byId("settings").open) this.settings.render();
  }

  #showBar() {
    const { conversation, model, preferences } = this;
    const running = this.turns.has(conversation);
    const title = conversation.title || t("untitled");
    byId("title").textContent = title;
    document.title = conversation.title ? `${title} · Tern` : "Tern";
    byId("model").textContent = model ? model.id : t("loading");
    byId("send").hidden = running;
    byId("stop").hidden = !running;
    byId("thinking").setAttribute("aria-pressed", String(preferences.settings.thinking));
    const offered = this.#options().tools.length;
    byId("tools-chip").querySelector("span").textContent = offered ? t("toolsOn", { count: count(offered) }) : t("tools");
    byId("tools-chip").classList.toggle("on", offered > 0);
    const use = contextUse(conversation, model?.max_model_len);
    byId("context").textContent = use?.short ?? "";
    byId("context").title = use?.long ?? "";
  }

  #lookLike() {
    const { theme, language } = this.preferences;
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    chooseLanguage(language);
    fillTexts();
  }

  #tick() {
    const turn = this.turns.get(this.conversation);
    if (turn?.live) this.thread.tick(turn.live);
  }

  #fitBox() {
    const box = byId("prompt");
    box.rows = 1;
    box.rows = Math.min(10, Math.max(1, Math.floor(box.scrollHeight / parseFloat(getComputedStyle(box).lineHeight))));
  }

  #drawer(open) {
    const over = DRAWER.matches && open;
    document.body.classList.toggle("with-drawer", over);
    byId("sidebar").inert = DRAWER.matches && !open;
    byId("main").inert = over;
    byId("open-sidebar").setAttribute("aria-expanded", String(over));
    if (over) byId("search").focus();
  }

  // --- keeping ---

  #keep() {
    savePreferences(this.preferences);
    this.#showBar();
  }

  #save(conversation) {
    if (this.conversations.includes(conversation)) this.store.put(conversation);
  }

  #export(conversations, name) {
    saveFile(`${name}.json`, "application/json", toJson(conversations));
  }

  #exportMarkdown() {
    const words = { untitled: t("untitled"), you: t("you"), model: this.model?.id ?? t("model"), thought: t("thought"), call: t("call"), result: t("result") };
    saveFile(`${fileName(this.conversation)}.md`, "text/markdown", toMarkdown(this.conversation, words));
  }

  async #import(file) {
    try {
      const read = fromJson(await file.text(), Date.now());
      for (const conversation of read) {
        this.conversations.push(conversation);
        await this.store.put(conversation);
      }
      this.conversations.sort((one, other) => other.updated - one.updated);
      notice(t("imported", { count: count(read.length) }));
      if (read.length) this.open(read[0]);
    } catch {
      notice(t("importFailed", { name: file.name }));
    }
  }

  #listen() {
    const click = (id, action) => byId(id).addEventListener("click", action);
    const menu = (id, action) => click(id, () => (byId("more-menu").hidePopover(), action()));
    const box = byId("prompt");
    click("new", this.startNew);
    click("open-sidebar", () => this.#drawer(true));
    click("close-sidebar", () => (this.#drawer(false), byId("open-sidebar").focus()));
    click("open-settings", this.toggleSettings);
    click("tools-chip", () => (byId("settings").open || this.toggleSettings(), byId("tools").scrollIntoView({ block: "nearest" }), byId("tools").querySelector("input").focus()));
    click("thinking", () => (this.setSetting("thinking", !this.preferences.settings.thinking), byId("settings").open && this.settings.render()));
    click("stop", () => (this.turns.get(this.conversation)?.stop(), box.focus()));
    menu("export-json", () => this.#export([this.conversation], fileName(this.conversation)));
    menu("export-markdown", () => this.#exportMarkdown());
    menu("open-keys", showKeys);
    click("export-all", () => this.#export(this.conversations, "tern"));
    click("import", () => byId("import-file").click());
    byId("import-file").addEventListener("change", (event) => {
      const [file] = event.target.files;
      if (file) this.#import(file);
      event.target.value = "";
    });
    byId("composer").addEventListener("submit", (event) => (event.preventDefault(), this.#send()));
    box.addEventListener("input", () => this.#fitBox());
    box.addEventListener("keydown", (event) => this.#typed(event));
    DRAWER.addEventListener("change", () => this.#drawer(false));
    addEventListener("pagehide", () => this.turns.forEach((turn, conversation) => this.#save(conversation)));
    listenToKeys(this);
  }

  #typed(event) {
    if (event.isComposing) return; // Enter chooses a word then, where words are composed
    if (event.key === "Enter" && !event.shiftKey) this.#send();
    else if (event.key === "ArrowUp" && event.target.value === "" && !this.turns.has(this.conversation)) this.thread.editLast();
    else return;
    event.preventDefault();
  }
}

/** A title as the name of a file. */
function fileName({ title }) {
  return title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "tern";
}

new Page().start();
