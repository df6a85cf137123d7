/** The messages of a conversation, as they are shown. */

import { autoGrow, copyButton, count, h, icon, iconButton } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { path, siblings } from "./tree.js";

const NEAR_END = 80; // pixels
const FRAME_MS = 50; // between two views of a reply that comes

export class Thread {
  #element = document.getElementById("thread");
  #scroll = document.getElementById("scroll");
  #toEnd = document.getElementById("to-end");
  #shown = new Map(); // id of a message -> its view
  #actions;
  #opened = new WeakSet(); // messages whose reasoning is unfolded
  #isText = false;
  #follows = true;
  #timer = null;

  /** actions: edit(message, text), regenerate(message), choose(message), retry(). */
  constructor(actions) {
    this.#actions = actions;
    this.#scroll.addEventListener("scroll", () => {
      this.#follows = this.#scroll.scrollHeight - this.#scroll.scrollTop - this.#scroll.clientHeight < NEAR_END;
      this.#toEnd.hidden = this.#follows;
    });
    this.#toEnd.addEventListener("click", () => this.toEnd());
  }

  /**
   * Show a conversation.
   * @param {{reply: Object|null, error: Error|null, isText: boolean}} state reply: the message that is being written;
   *   isText: messages are parts of one text.
   */
  show(conversation, { reply, error, isText }) {
    this.#isText = isText;
    this.#shown.clear();
    const views = path(conversation).map((message) => this.#view(conversation, message, message === reply));
    this.#element.replaceChildren(...views, ...(error ? [this.#error(error)] : []));
    this.#element.setAttribute("aria-busy", String(reply !== null));
    if (this.#follows) this.#jump();
  }

  /** Show what has come of a reply, soon. */
  update(message) {
    this.#timer ??= setTimeout(() => {
      this.#timer = null;
      const view = this.#shown.get(message);
      if (!view?.isConnected) return;
      this.#fill(view, message, true);
      if (this.#follows) this.#jump();
    }, FRAME_MS);
  }

  toEnd() {
    this.#follows = true;
    this.#toEnd.hidden = true;
    this.#jump();
  }

  /** Begin to edit a message of the user's. */
  edit(message) {
    const view = this.#shown.get(message);
    const area = h("textarea", { "aria-label": "Edited message", rows: 1 });
    area.value = message.content;
    const leave = () => {
      form.replaceWith(view);
      view.querySelector("button")?.focus();
    };
    const form = h("form", {
      class: "editor",
      onsubmit: (event) => {
        event.preventDefault();
        if (area.value.trim()) this.#actions.edit(message, area.value);
      },
      onkeydown: (event) => {
        if (event.key === "Escape") leave();
        else if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
        else form.requestSubmit();
        event.preventDefault();
        event.stopPropagation();
      },
    }, area, h("menu", {}, h("button", { type: "button", class: "plain", onclick: leave }, "Cancel"),
      h("button", { class: "filled" }, "Send")));
    view.replaceWith(form);
    autoGrow(area);
    area.focus();
  }

  /** Have the keyboard stay where it was when another version was chosen. */
  focusOnBranches(message) {
    this.#shown.get(message)?.querySelector(".branches button:enabled")?.focus();
  }

  #jump() {
    this.#scroll.scrollTop = this.#scroll.scrollHeight;
  }

  #view(conversation, message, isWritten) {
    const isUser = message.role === "user";
    const view = h("article", { class: `message ${message.role}`, "aria-label": isUser ? "You" : "Model" });
    if (!isUser) view.append(this.#reasoning(message));
    view.append(h("div", { class: isUser || this.#isText ? "body" : "body prose" }));
    view.append(h("footer", {}, ...(isWritten ? [] : this.#tools(conversation, message))));
    this.#shown.set(message, view);
    this.#fill(view, message, isWritten);
    return view;
  }

  #fill(view, message, isWritten) {
    const body = view.querySelector(".body");
    if (body.classList.contains("prose")) renderMarkdown(body, message.content);
    else body.textContent = message.content;
    view.classList.toggle("waiting", isWritten && !message.content && !message.reasoning);
    view.classList.toggle("written", isWritten);
    const thoughts = view.querySelector(".reasoning");
    if (!thoughts || !message.reasoning) return;
    thoughts.hidden = false;
    const isThinking = isWritten && !message.content;
    thoughts.classList.toggle("busy", isThinking);
    thoughts.querySelector("span").textContent = isThinking ? "Thinking…" : thoughtFor(message);
    renderMarkdown(thoughts.querySelector(".prose"), message.reasoning);
  }

  /** Folded, unless the user has unfolded it. */
  #reasoning(message) {
    const note = ({ target }) => (target.open ? this.#opened.add(message) : this.#opened.delete(message));
    const properties = { class: "reasoning", hidden: true, open: this.#opened.has(message), ontoggle: note };
    return h("details", properties, h("summary", {}, icon("after"), h("span", {})), h("div", { class: "prose" }));
  }

  #tools(conversation, message) {
    const isUser = message.role === "user";
    const tools = [copyButton("Copy message", () => message.content)];
    if (isUser) tools.push(iconButton("edit", "Edit message", () => this.edit(message)));
    else tools.push(iconButton("again", "Another reply", () => this.#actions.regenerate(message)));
    const others = siblings(conversation, message);
    if (others.length > 1) tools.push(this.#branches(others, message));
    if (message.stats) tools.push(h("span", { class: "stats", title: longStats(message.stats) }, stats(message)));
    return tools;
  }

  /** Which of several messages in the same place is shown, and the way to the others. */
  #branches(others, message) {
    const at = others.indexOf(message);
    const step = (name, label, to) =>
      iconButton(name, label, () => this.#actions.choose(others[to]), { disabled: others[to] === undefined });
    return h("span", { class: "branches", role: "group", "aria-label": `Version ${at + 1} of ${others.length}` },
      step("before", "Version before", at - 1), `${at + 1}/${others.length}`, step("after", "Version after", at + 1));
  }

  #error(error) {
    return h("p", { class: "error", role: "alert" }, h("span", {}, error.message),
      h("button", { type: "button", class: "plain", onclick: () => this.#actions.retry() }, "Try again"));
  }
}

function thoughtFor({ thoughtFor: seconds }) {
  return seconds >= 1 ? `Thought for ${count(Math.round(seconds))} s` : "Thoughts";
}

const ENDINGS = { length: "the limit was reached", stopped: "stopped", lost: "not finished" };

function stats({ stats: { generated, perSecond }, ending }) {
  const parts = [`${count(generated)} tokens`];
  if (perSecond) parts.push(`${perSecond.toFixed(perSecond < 10 ? 1 : 0)} tokens/s`);
  if (ENDINGS[ending]) parts.push(ENDINGS[ending]);
  return parts.join(" · ");
}

function longStats({ prompt, cached, promptSeconds }) {
  if (prompt === undefined) return null;
  return `Prompt of ${count(prompt)} tokens, ${count(cached)} of them known already, read in ${promptSeconds.toFixed(2)} s`;
}
