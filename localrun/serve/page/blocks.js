/**
 * Markdown split into blocks: headings, paragraphs, code, quotes, lists, tables, rules. The common part of CommonMark
 * (https://spec.commonmark.org) and GitHub's tables; a text that is not finished yet parses as what it seems to become.
 *
 * A block: {kind, source, ...}; source is the text that it came from, by which a stream tells what has changed.
 */

const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s|$)/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s{0,8})([-*+]|\d{1,9}[.)])(?:\s+|$)/;
const TABLE_RULE = /^\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?$/;
const MOST_NESTED = 12;

/** The blocks of a text. */
export function blocks(text, depth = 0) {
  const lines = text.split("\n");
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, end] = blockAt(lines, at, depth);
    found.push({ ...block, source: lines.slice(at, end).join("\n") });
    at = end;
  }
  return found;
}

/** The block that begins with a line, and the line after it. */
function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return fenced(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    const text = line.slice(heading[0].length).trim().replace(/(^|\s)#+$/, "").trim();
    return [{ kind: "heading", level: heading[1].length, text }, at + 1];
  }
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (depth < MOST_NESTED && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < MOST_NESTED && ITEM.test(line)) return list(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  return paragraph(lines, at);
}

function fenced(lines, at, [, indent, ticks, info]) {
  const isEnd = (line) => line.trim().startsWith(ticks) && !line.trim().replaceAll(ticks[0], "");
  const strip = new RegExp(`^ {0,${indent.length}}`);
  let end = at + 1;
  while (end < lines.length && !isEnd(lines[end])) end += 1;
  const text = lines.slice(at + 1, end).map((line) => line.replace(strip, "")).join("\n");
  const closed = end < lines.length;
  return [{ kind: "code", language: info.trim().split(/\s/)[0], text, closed }, closed ? end + 1 : end];
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && (QUOTE.test(lines[end]) || (lines[end].trim() && !interrupts(lines[end])))) end += 1;
  const text = lines.slice(at, end).map((line) => line.replace(QUOTE, "")).join("\n");
  return [{ kind: "quote", blocks: blocks(text, depth + 1) }, end];
}

/** Items of one kind; what is indented as far as an item's text belongs to it. */
function list(lines, at, depth) {
  const [, outer, mark] = ITEM.exec(lines[at]);
  const kind = mark.at(-1);
  const items = [];
  let end = at;
  let isLoose = false;
  let hasGap = false;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || item[2].at(-1) !== kind || item[1].length > outer.length + 1 || RULE.test(lines[end])) break;
    isLoose ||= hasGap;
    const width = Math.min(item[0].length, item[1].length + item[2].length + 4) || 1;
    const own = [lines[end].slice(width)];
    end += 1;
    while (end < lines.length && belongs(lines, end, width, own)) own.push(withoutIndent(lines[end++], width));
    while (own.length > 1 && !own.at(-1).trim()) {
      own.pop();
      hasGap = true;
    }
    items.push(blocks(own.join("\n"), depth + 1));
  }
  const start = /\d/.test(mark) ? Number.parseInt(mark, 10) : null;
  return [{ kind: "list", start, items, isLoose }, end];
}

/** Whether a line goes on with an item whose text begins at `width`. */
function belongs(lines, at, width, own) {
  const line = lines[at];
  if (!line.trim()) return true;
  const indent = line.length - line.trimStart().length;
  if (indent >= Math.min(width, 2) && (indent >= width || ITEM.test(line) || !own.at(-1).trim())) return true;
  return Boolean(own.at(-1).trim()) && !interrupts(line); // a paragraph's next line, lazily
}

function withoutIndent(line, width) {
  const indent = line.length - line.trimStart().length;
  return line.slice(Math.min(indent, width));
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && TABLE_RULE.test(lines[at + 1].trim())
    && cells(lines[at]).length === cells(lines[at + 1]).length;
}

function table(lines, at) {
  const align = cells(lines[at + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left");
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const rows = lines.slice(at + 2, end).map(cells);
  return [{ kind: "table", align, head: cells(lines[at]), rows }, end];
}

/** The cells of a row: what stands between bars that are not escaped. */
function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines[end]) && !isTable(lines, end)) end += 1;
  const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
  return [{ kind: "paragraph", text }, end];
}

/** Whether a line ends the paragraph before it. */
function interrupts(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
}
