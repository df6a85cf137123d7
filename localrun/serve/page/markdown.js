/** Markdown as elements, made anew only from where a text has changed. */

import { blocks } from "./blocks.js";
import { copyButton, h } from "./dom.js";
import { highlighted } from "./highlight.js";
import { inline } from "./inline.js";

/** Show a text in an element; the blocks that it shows already stay, with what the user has selected in them. */
export function renderMarkdown(element, text) {
  const found = blocks(text);
  let same = 0;
  while (same < found.length && element.children[same]?.source === found[same].source) same += 1;
  while (element.children.length > same) element.lastChild.remove();
  for (const block of found.slice(same)) {
    const made = RENDER[block.kind](block);
    made.source = block.source;
    element.append(made);
  }
}

const RENDER = {
  paragraph: ({ text }) => h("p", {}, ...inline(text)),
  heading: ({ level, text }) => h(`h${level}`, {}, ...inline(text)),
  rule: () => h("hr"),
  quote: (block) => h("blockquote", {}, ...block.blocks.map(render)),
  code: codeBlock,
  list: ({ start, items, isLoose }) => {
    const made = items.map((item) => h("li", {}, ...item.flatMap((block) => inItem(block, isLoose))));
    return start === null ? h("ul", {}, ...made) : h("ol", { start: start === 1 ? null : start }, ...made);
  },
  table: ({ align, head, rows }) => {
    const row = (tag, cells) => h("tr", {}, ...align.map((side, column) =>
      h(tag, { class: side === "left" ? null : side }, ...inline(cells[column] ?? ""))));
    return h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
      h("table", {}, h("thead", {}, row("th", head)), h("tbody", {}, ...rows.map((cells) => row("td", cells)))));
  },
};

function render(block) {
  return RENDER[block.kind](block);
}

/** Items without blank lines between them are no paragraphs. */
function inItem(block, isLoose) {
  return block.kind === "paragraph" && !isLoose ? inline(block.text) : [render(block)];
}

function codeBlock({ language, text }) {
  return h("figure", { class: "code" },
    h("figcaption", {}, h("span", {}, language || "text"), copyButton("Copy code", () => text)),
    h("pre", { tabindex: "0" }, h("code", {}, ...highlighted(text, language))));
}
