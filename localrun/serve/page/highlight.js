/**
 * Colours for code that hold for most languages alike: comments, strings, numbers, keywords, names that are called.
 * It knows no grammar: what it colours wrongly is still the same text.
 */

import { h } from "./dom.js";

const MOST_CHARACTERS = 50_000; // above it the text stays plain
const KEYWORDS = new Set(
  `abstract and as assert async await begin bool boolean break case catch char class const continue def default defer del
  delete do double elif else elsif end enum except export extends extern false final finally float fn for foreach from
  func function global go goto if impl implements import in include inline instanceof int interface is lambda let local
  long loop match mod module mut namespace new nil none nonlocal not null of or override package pass private protected
  pub public raise readonly ref require return self short signed sizeof static struct super switch template then this
  throw throws trait true try type typedef typeof union unsigned until use using var virtual void volatile when where
  while with yield`.split(/\s+/),
);
const SQL = new Set(
  `select from where join left right inner outer on group by order having limit insert into values update set delete
  create table index primary key foreign references not null and or as distinct union all in is like between case when
  then else end count sum avg min max`.split(/\s+/),
);

// Of a language's comments those to the end of a line; all others have // and /* */.
const HASH = /^(py|python|sh|bash|zsh|shell|console|rb|ruby|ya?ml|toml|ini|r|perl|make|makefile|dockerfile|nix|julia|jl)$/;
const DASHES = /^(sql|lua|haskell|hs|ada|elm)$/;
const PLAIN = /^(|text|txt|plain|plaintext|output|md|markdown|csv|log)$/;

const STRING = String.raw`"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'`;
const REST = String.raw`(?<number>\b(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b)|(?<word>[A-Za-z_$][\w$]*)`;

function pattern(comment, strings = STRING) {
  return new RegExp(`(?<comment>${comment})|(?<string>${strings})|${REST}`, "g");
}

const PATTERNS = {
  hash: pattern(String.raw`(?<![^\s;(])#[^\n]*`),
  dashes: pattern(String.raw`--[^\n]*`),
  slashes: pattern(String.raw`\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`, STRING + "|`(?:\\\\.|[^`\\\\])*`?"),
  html: pattern(String.raw`<!--[\s\S]*?(?:-->|$)`, String.raw`"[^"<>\n]*"`),
};

/** Nodes that show a text in a language. */
export function highlighted(text, language) {
  const name = language.toLowerCase();
  if (PLAIN.test(name) || text.length > MOST_CHARACTERS) return [text];
  const keywords = name === "sql" ? SQL : KEYWORDS;
  const nodes = [];
  let at = 0;
  for (const found of text.matchAll(patternFor(name))) {
    const kind = kindOf(found, text, keywords, name);
    if (!kind) continue;
    nodes.push(text.slice(at, found.index), h("span", { class: `tok-${kind}` }, found[0]));
    at = found.index + found[0].length;
  }
  nodes.push(text.slice(at));
  return nodes;
}

function patternFor(name) {
  if (HASH.test(name)) return PATTERNS.hash;
  if (DASHES.test(name)) return PATTERNS.dashes;
  return /^(html|xml|svg|vue)$/.test(name) ? PATTERNS.html : PATTERNS.slashes;
}

function kindOf({ index, 0: match, groups }, text, keywords, name) {
  if (groups.comment !== undefined) return "comment";
  if (groups.string !== undefined) return "string";
  if (groups.number !== undefined) return "number";
  if (keywords.has(name === "sql" ? match.toLowerCase() : match) || /^(True|False|None)$/.test(match)) return "keyword";
  return text[index + match.length] === "(" ? "call" : null;
}
