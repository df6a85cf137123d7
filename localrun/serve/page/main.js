/** The page: conversations with the server's model, as the user sees and steers them. */

import { Server } from "./api.js";
import { askKey, askSettings, toast } from "./dialogs.js";
import { autoGrow, count, download, icon } from "./dom.js";
import { Replies } from "./replies.js";
import { Sidebar } from "./sidebar.js";
import { readKey, readSettings, Store, writeKey, writeSettings } from "./store.js";
import { Thread } from "./thread.js";
import { add, choose, create, path } from "./tree.js";

const $ = (id) => document.getElementById(id);
const HINT = $("status").textContent;

class Page {
  #server = new Server();
  #settings = readSettings();
  #conversations = [];
  #current = create();
  #store;
  #replies;
  #thread = new Thread({
    edit: (message, text) => this.#edit(message, text),
    regenerate: (message) => this.#reply(message.parent),
    choose: (message) => this.#choose(message),
    retry: () => this.#retry(),
  });
  #sidebar = new Sidebar({
    open: (conversation) => this.#open(conversation),
    rename: (conversation, title) => this.#rename(conversation, title),
    remove: (conversation) => this.#remove(conversation),
    create: () => this.#open(create()),
  });
  #grow = autoGrow($("input"));

  async start() {
    this.#applyTheme();
    this.#store = await Store.open(() => this.#say("This browser keeps nothing: what is not exported is lost with the page."));
    this.#conversations = await this.#store.all();
    this.#replies = new Replies(this.#server, this.#store, {
      update: (message) => this.#thread.update(message),
      progress: (conversation, text) => conversation === this.#current && this.#say(text),
      change: (conversation) => this.#changed(conversation),
    });
    this.#listen();
    this.#open(this.#conversations.find(({ id }) => `#${id}` === location.hash) ?? this.#current);
    this.#server.key = readKey();
    await this.#connect();
  }

  async #connect() {
    try {
      await this.#server.connect();
    } catch (error) {
      if (error.status === 401) return this.#askKey(() => this.#connect());
      this.#replies.fail(this.#current, error);
      return this.#show();
    }
    const { name, context, chats } = this.#server.model;
    $("model").textContent = name;
    document.title = `${name} · localrun`;
    $("welcome-title").textContent = chats ? "What would you like to know?" : "How does it begin?";
    $("welcome-text").textContent = chats
      ? `${name} runs on this machine, with room for ${count(context)} tokens.`
      : `${name} has no chat template: it continues what you write. Try “Once upon a time, there was a little fox”.`;
    $("input").placeholder = chats ? "Write a message" : "Begin a text, or go on with it";
    this.#replies.fail(this.#current, null);
    this.#show();
  }

  async #askKey(then) {
    const key = await askKey();
    if (!key) return;
    this.#server.key = key;
    writeKey(key);
    await then();
  }

  // ---- what the user does --------------------------------------------------------------------------------------------

  #send() {
    const text = $("input").value;
    if (!text.trim() || !this.#server.model || this.#replies.of(this.#current)) return;
    $("input").value = "";
    this.#grow();
    // A message that got no reply makes room: templates want replies between messages.
    const last = this.#current.messages[this.#current.leaf];
    const message = add(this.#current, last?.role === "user" ? last.parent : this.#current.leaf, "user", text);
    if (!this.#conversations.includes(this.#current)) this.#conversations.unshift(this.#current);
    this.#reply(message.id);
  }

  #reply(parent) {
    if (this.#replies.of(this.#current)) return;
    this.#thread.toEnd();
    focusOnInput();
    this.#replies.start(this.#current, parent, this.#settings);
  }

  #retry() {
    const { leaf, messages } = this.#current;
    const error = this.#replies.error(this.#current);
    if (!this.#server.model) this.#connect();
    else if (error?.status === 401) this.#askKey(() => this.#retryReply());
    else if (leaf !== null && messages[leaf]) this.#retryReply();
  }

  #retryReply() {
    const message = this.#current.messages[this.#current.leaf];
    this.#reply(message.role === "user" ? message.id : message.parent);
  }

  #edit(message, text) {
    if (this.#replies.of(this.#current)) return;
    this.#reply(add(this.#current, message.parent, "user", text).id);
  }

  #choose(message) {
    if (this.#replies.of(this.#current)) return;
    choose(this.#current, message);
    this.#store.save(this.#current);
    this.#show();
    this.#thread.focusOnBranches(message);
  }

  #open(conversation) {
    this.#current = conversation;
    const isKept = this.#conversations.includes(conversation);
    history.replaceState(null, "", isKept ? `#${conversation.id}` : location.pathname);
    this.#sidebar.leave();
    this.#show();
    this.#thread.toEnd();
    focusOnInput();
  }

  #rename(conversation, title) {
    conversation.title = title;
    this.#store.save(conversation);
    this.#show();
  }

  #remove(conversation) {
    const at = this.#conversations.indexOf(conversation);
    this.#replies.forget(conversation);
    this.#conversations.splice(at, 1);
    this.#store.remove(conversation);
    if (conversation === this.#current) this.#open(create());
    else this.#show();
    toast(`“${conversation.title}” was deleted.`, () => {
      this.#conversations.splice(at, 0, conversation);
      this.#store.save(conversation);
      this.#open(conversation);
    });
  }

  async #openSettings() {
    const exportAll = () =>
      download("localrun-conversations.json", JSON.stringify(this.#conversations, null, 1), "application/json");
    const given = await askSettings(this.#settings, this.#server.key, exportAll);
    if (!given) return;
    this.#settings = given.settings;
    writeSettings(given.settings);
    this.#server.key = given.key || null;
    writeKey(given.key);
    this.#applyTheme();
    if (!this.#server.model) await this.#connect();
  }

  // ---- what the user sees --------------------------------------------------------------------------------------------

  /** A conversation has changed: a reply has begun or ended. */
  #changed(conversation) {
    this.#conversations.sort((a, b) => b.updated - a.updated);
    if (conversation === this.#current) {
      history.replaceState(null, "", `#${conversation.id}`);
      this.#say(this.#replies.of(conversation) ? "Esc stops" : HINT);
    }
    this.#show();
  }

  #show() {
    const reply = this.#replies.of(this.#current);
    const error = this.#replies.error(this.#current);
    this.#thread.show(this.#current, { reply, error, isText: this.#server.model?.chats === false });
    this.#sidebar.show(this.#conversations, this.#current, this.#replies.busy);
    $("welcome").hidden = this.#current.leaf !== null || !this.#server.model;
    $("send").setAttribute("aria-label", reply ? "Stop" : "Send");
    $("send").replaceChildren(icon(reply ? "stop" : "send"));
    this.#showSendable();
    this.#showContext();
  }

  #showSendable() {
    const isWritten = this.#replies.of(this.#current) !== null;
    $("send").disabled = !isWritten && (!$("input").value.trim() || !this.#server.model);
  }

  #showContext() {
    const last = path(this.#current).findLast(({ stats }) => stats?.total);
    $("context").hidden = !last || !this.#server.model;
    if ($("context").hidden) return;
    const { context } = this.#server.model;
    $("context-text").textContent = `${count(last.stats.total)} of ${count(context)} tokens`;
    Object.assign($("context-meter"), { max: context, high: 0.9 * context, value: last.stats.total });
  }

  #say(text) {
    $("status").textContent = text;
  }

  #applyTheme() {
    document.documentElement.dataset.theme = this.#settings.theme;
  }

  // ---- keys and buttons ----------------------------------------------------------------------------------------------

  #listen() {
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#replies.of(this.#current)) this.#replies.stop(this.#current);
      else this.#send();
    });
    $("input").addEventListener("input", () => this.#showSendable());
    $("input").addEventListener("keydown", (event) => this.#inputKey(event));
    $("open-settings").addEventListener("click", () => this.#openSettings());
    document.addEventListener("keydown", (event) => this.#key(event));
    window.addEventListener("pagehide", () => this.#replies.keepAll());
  }

  #inputKey(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      this.#send();
    } else if (event.key === "ArrowUp" && !$("input").value && !this.#replies.of(this.#current)) {
      const last = path(this.#current).findLast(({ role }) => role === "user");
      if (last) this.#thread.edit(last);
      event.preventDefault();
    }
  }

  #key(event) {
    if (document.querySelector("dialog[open]")) return;
    const letter = event.altKey && !event.ctrlKey && !event.metaKey ? event.code : "";
    const isTyping = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName);
    if (letter === "KeyN") this.#open(create());
    else if (letter === "KeyB") this.#sidebar.toggle();
    else if (letter === "KeyS") this.#openSettings();
    else if (event.key === "Escape") this.#replies.stop(this.#current);
    else if (event.key === "/" && !isTyping) $("input").focus();
    else return;
    event.preventDefault();
  }
}

/** Not on a phone, whose keyboard would cover the reply. */
function focusOnInput() {
  if (window.matchMedia("(pointer: fine)").matches) $("input").focus();
}

await new Page().start();
