/**
 * Markdown within a paragraph: code, emphasis, links, line breaks. What does not parse stays as it is written.
 *
 * Only http, https and mailto become links, and images become links as well: the page asks no other server for anything
 * unless the user clicks.
 */

import { h } from "./dom.js";

const SPECIAL = /[\\`*_~[!<\nh]/g;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const LINK = /^https?:\/\/[^\s<>"`]*[^\s<>"`.,;:!?'*_~)\]]/;
const ANGLE_LINK = /^<((?:https?:\/\/|mailto:)[^\s<>]+)>/;
const MOST_NESTED = 20;
const MOST_AHEAD = 4000; // characters in which a mark's end is looked for: else a text of marks alone takes forever
const WORD = /[\p{L}\p{N}]/u;

/** Nodes for a text. */
export function inline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
  };
  let at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const found = SPECIAL.exec(text)?.index ?? text.length;
    plain += text.slice(at, found);
    at = found;
    if (at === text.length) break;
    const parsed = depth < MOST_NESTED ? special(text, at, depth) : null;
    if (!parsed) {
      plain += text[at];
      at += 1;
    } else if (parsed.text !== undefined) {
      plain += parsed.text;
      at = parsed.end;
    } else {
      flush();
      nodes.push(parsed.node);
      at = parsed.end;
    }
  }
  flush();
  return nodes;
}

/** {node or text, end} of what begins at a special character; null if it is nothing special. */
function special(text, at, depth) {
  switch (text[at]) {
    case "\\":
      return PUNCTUATION.test(text[at + 1] ?? "") ? { text: text[at + 1], end: at + 2 } : null;
    case "\n":
      return { node: h("br"), end: at + 1 };
    case "`":
      return code(text, at);
    case "!":
      return text[at + 1] === "[" ? link(text, at + 1, depth) : null;
    case "[":
      return link(text, at, depth);
    case "<": {
      const found = ANGLE_LINK.exec(text.slice(at, at + 2048));
      return found && { node: anchor(found[1], [found[1]]), end: at + found[0].length };
    }
    case "h": {
      if (!text.startsWith("http", at) || WORD.test(text[at - 1] ?? "")) return null;
      const found = LINK.exec(text.slice(at, at + 2048));
      return found && { node: anchor(found[0], [found[0]]), end: at + found[0].length };
    }
    default:
      return emphasis(text, at, depth);
  }
}

function code(text, at) {
  const ticks = run(text, at);
  for (let end = at + ticks; (end = text.indexOf("`", end)) >= 0; ) {
    const length = run(text, end);
    if (length === ticks) {
      let inside = text.slice(at + ticks, end).replaceAll("\n", " ");
      if (/^ .*[^ ].* $/.test(inside)) inside = inside.slice(1, -1);
      return { node: h("code", {}, inside), end: end + length };
    }
    end += length;
  }
  return { text: text.slice(at, at + ticks), end: at + ticks };
}

/** [words](address "title"), with balanced brackets in the words. */
function link(text, at, depth) {
  const close = closing(text, at, "[", "]");
  if (close < 0 || text[close + 1] !== "(") return null;
  const end = closing(text, close + 1, "(", ")");
  if (end < 0) return null;
  const [, address = ""] = /^\s*<?([^\s<>]*)>?/.exec(text.slice(close + 2, end));
  const words = text.slice(at + 1, close);
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return null;
  const children = words ? inline(words, depth + 1) : [address];
  const flat = children.map((node) => (node.tagName === "A" ? node.textContent : node)); // no link in a link
  return { node: anchor(address, flat), end: end + 1 };
}

function anchor(address, children) {
  return h("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

/** *one*, **two**, ***three***, with _ as well, where it is not within a word; ~~struck~~. */
function emphasis(text, at, depth) {
  const mark = text[at];
  const length = run(text, at);
  const literal = { text: text.slice(at, at + length), end: at + length };
  if (length > 3 || (mark === "~" && length !== 2) || isSpace(text[at + length])) return literal;
  if (mark === "_" && WORD.test(text[at - 1] ?? "")) return literal;
  for (let end = at + length; (end = text.indexOf(mark, end)) >= 0 && end < at + MOST_AHEAD; ) {
    const closes = run(text, end);
    const isWithinWord = mark === "_" && WORD.test(text[end + closes] ?? "");
    if (closes === length && !isSpace(text[end - 1]) && text[end - 1] !== "\\" && !isWithinWord) {
      const children = inline(text.slice(at + length, end), depth + 1);
      return { node: wrapped(mark, length, children), end: end + closes };
    }
    end += closes;
  }
  return literal;
}

function wrapped(mark, length, children) {
  if (mark === "~") return h("del", {}, ...children);
  if (length === 1) return h("em", {}, ...children);
  const strong = h("strong", {}, ...children);
  return length === 2 ? strong : h("em", {}, strong);
}

/** How often the character at a place is repeated. */
function run(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function closing(text, at, open, close) {
  let depth = 0;
  for (let end = at; end < Math.min(text.length, at + MOST_AHEAD); end += 1) {
    if (text[end] === "\\") end += 1;
    else if (text[end] === open) depth += 1;
    else if (text[end] === close && (depth -= 1) === 0) return end;
  }
  return -1;
}

function isSpace(character) {
  return character === undefined || /\s/.test(character);
}
