/** What stays in the browser: conversations in IndexedDB, settings and the key in localStorage. */

const DATABASE = "localrun";
const CONVERSATIONS = "conversations";
const SETTINGS = "localrun.settings";
const KEY = "localrun.key";

/** Empty fields are left to the server: it knows what the model's makers recommend. */
export const USUAL = { system: "", temperature: "", top_p: "", max_tokens: "", thinking: "", theme: "" };

export class Store {
  #database = null;
  #failed;
  #memory = new Map(); // where the browser keeps nothing, as in some private windows

  /** failed: called when the browser refuses to keep something. */
  static async open(failed) {
    const store = new Store();
    store.#failed = failed;
    try {
      const request = indexedDB.open(DATABASE, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(CONVERSATIONS, { keyPath: "id" });
      store.#database = await result(request);
    } catch {
      failed();
    }
    return store;
  }

  /** All conversations, the latest first. */
  async all() {
    const found = this.#database ? await result(this.#objects("readonly").getAll()) : [...this.#memory.values()];
    return found.sort((a, b) => b.updated - a.updated);
  }

  async save(conversation) {
    if (!this.#database) {
      this.#memory.set(conversation.id, conversation);
      return;
    }
    try {
      await result(this.#objects("readwrite").put(conversation));
    } catch {
      this.#failed();
    }
  }

  async remove(conversation) {
    if (this.#database) await result(this.#objects("readwrite").delete(conversation.id));
    else this.#memory.delete(conversation.id);
  }

  #objects(mode) {
    return this.#database.transaction(CONVERSATIONS, mode).objectStore(CONVERSATIONS);
  }
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Settings as they were left, with usual values for what is missing. */
export function readSettings() {
  try {
    const kept = JSON.parse(localStorage.getItem(SETTINGS) ?? "{}");
    return Object.fromEntries(Object.entries(USUAL).map(([name, usual]) => [name, kept[name] ?? usual]));
  } catch {
    return { ...USUAL };
  }
}

export function writeSettings(settings) {
  write(SETTINGS, JSON.stringify(settings));
}

export function readKey() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null;
  }
}

export function writeKey(key) {
  write(KEY, key);
}

function write(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {
    // Full, or not allowed: it holds until the page is left.
  }
}
