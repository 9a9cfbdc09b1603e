// Keeps conversations (IndexedDB) and preferences (localStorage) in this browser. Knows storage; knows not what is stored.
// Where the browser keeps nothing (a private window, a full disk) everything works until the page is closed.

const DATABASE = "tern";
const CONVERSATIONS = "conversations";
const PREFERENCES = "tern.preferences";
const KEY = "tern.api-key";

const DEFAULTS = {
  theme: "system",
  language: null,
  settings: { thinking: true, thinking_budget: null, temperature: null, top_p: null, top_k: null, max_tokens: null, seed: null },
  tools: [],
  enabledTools: [],
};

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** The conversations of this browser. `lasting` is false where they will be gone with the page. */
export class ConversationStore {
  static async open() {
    try {
      const request = indexedDB.open(DATABASE, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(CONVERSATIONS, { keyPath: "id" });
      return new ConversationStore(await done(request));
    } catch {
      return new ConversationStore(null);
    }
  }

  constructor(database) {
    this.database = database;
    this.lasting = database !== null;
  }

  /** All of them, the one used last first. */
  async all() {
    if (!this.database) return [];
    const found = await done(this.#objects("readonly").getAll());
    return found.sort((one, other) => other.updated - one.updated);
  }

  async put(conversation) {
    await this.#write((objects) => objects.put(JSON.parse(JSON.stringify(conversation))));
  }

  async remove(id) {
    await this.#write((objects) => objects.delete(id));
  }

  async #write(action) {
    if (!this.database) return;
    try {
      await done(action(this.#objects("readwrite")));
    } catch {
      this.lasting = false; // the disk is full, or the user took the permission back
    }
  }

  #objects(mode) {
    return this.database.transaction(CONVERSATIONS, mode).objectStore(CONVERSATIONS);
  }
}

/** What the user chose, with defaults for the rest. */
export function loadPreferences() {
  const kept = read(localStorage, PREFERENCES) ?? {};
  return { ...DEFAULTS, ...kept, settings: { ...DEFAULTS.settings, ...kept.settings } };
}

export function savePreferences(preferences) {
  write(localStorage, PREFERENCES, preferences);
}

/** The API key: kept until the tab is closed, or on this device if the user wants that. */
export function loadKey() {
  return read(sessionStorage, KEY) ?? read(localStorage, KEY);
}

export function saveKey(key, remember) {
  write(sessionStorage, KEY, key);
  write(localStorage, KEY, remember ? key : null);
}

function read(storage, name) {
  try {
    return JSON.parse(storage.getItem(name));
  } catch {
    return null;
  }
}

function write(storage, name, value) {
  try {
    if (value === null) storage.removeItem(name);
    else storage.setItem(name, JSON.stringify(value));
  } catch {
    // Closed or full: it holds until the page is closed.
  }
}
