/** The list of conversations: open, rename, export, delete. */

import { download, h, iconButton } from "./dom.js";
import { markdown } from "./tree.js";

const narrow = window.matchMedia("(max-width: 760px)");

export class Sidebar {
  #list = document.getElementById("conversations");
  #show = document.getElementById("show");
  #actions;

  /** actions: open(conversation), rename(conversation, title), remove(conversation), create(). */
  constructor(actions) {
    this.#actions = actions;
    document.getElementById("new").addEventListener("click", () => actions.create());
    document.getElementById("hide").addEventListener("click", () => this.toggle(false));
    document.getElementById("veil").addEventListener("click", () => this.toggle(false));
    this.#show.addEventListener("click", () => this.toggle(true));
    narrow.addEventListener("change", () => this.#set(!narrow.matches));
    this.#set(!narrow.matches);
  }

  get isOpen() {
    return document.body.classList.contains("with-sidebar");
  }

  toggle(isOpen = !this.isOpen) {
    this.#set(isOpen);
    document.getElementById(isOpen ? "hide" : "show").focus();
  }

  /** Give the room back on a narrow screen, once something was chosen. */
  leave() {
    if (narrow.matches) this.#set(false);
  }

  /** @param {Set<string>} busy ids of conversations in which a reply is being written. */
  show(conversations, current, busy) {
    this.#list.replaceChildren(...conversations.map((each) => this.#row(each, each === current, busy.has(each.id))));
  }

  #set(isOpen) {
    document.body.classList.toggle("with-sidebar", isOpen);
    document.getElementById("sidebar").inert = !isOpen;
    this.#show.setAttribute("aria-expanded", String(isOpen));
  }

  #row(conversation, isCurrent, isBusy) {
    const title = conversation.title || "New conversation";
    const row = h("li", { class: isBusy ? "busy" : null },
      h("button", {
        type: "button", class: "row", title, "aria-current": isCurrent ? "true" : null,
        onclick: () => this.#actions.open(conversation), ondblclick: () => this.#rename(row, conversation),
      }, title),
      h("span", { class: "tools" },
        iconButton("edit", `Rename ${title}`, () => this.#rename(row, conversation)),
        iconButton("export", `Export ${title}`, () =>
          download(`${fileName(title)}.md`, markdown(conversation), "text/markdown")),
        iconButton("delete", `Delete ${title}`, () => this.#actions.remove(conversation))));
    return row;
  }

  #rename(row, conversation) {
    const input = h("input", { "aria-label": "Title", maxlength: 200 });
    input.value = conversation.title;
    let isOver = false;
    const end = (title) => {
      if (isOver) return;
      isOver = true;
      this.#actions.rename(conversation, title.trim() || conversation.title);
    };
    input.addEventListener("blur", () => end(input.value));
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) end(input.value);
      else if (event.key === "Escape") end(conversation.title);
      else return;
      event.stopPropagation();
    });
    row.replaceChildren(input);
    input.select();
  }
}

function fileName(title) {
  return title.replace(/[^\p{L}\p{N} ._-]+/gu, "").trim().slice(0, 60) || "conversation";
}
