/**
 * A conversation: a tree of messages, of which the path to one leaf is shown. An edited message or another reply is a
 * new branch beside the old one, which stays. Plain data, so that the store keeps it as it is.
 *
 * A message: {id, parent, role, content, reasoning, thoughtFor, stats, ending}; id is its place in the list of messages;
 * ending is why a reply ended: "stop", "length", "stopped" by the user, or "lost".
 */

const TITLE_LENGTH = 60;

export function create() {
  const id = [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "", updated: Date.now(), messages: [], leaf: null };
}

/** Add a message after `parent`, null for the beginning, and show it. */
export function add(conversation, parent, role, content = "") {
  const message = { id: conversation.messages.length, parent, role, content, reasoning: "" };
  conversation.messages.push(message);
  conversation.leaf = message.id;
  conversation.updated = Date.now();
  if (!conversation.title && role === "user") conversation.title = titleOf(content);
  return message;
}

/** Take back the last message that was added. */
export function removeLast(conversation) {
  const message = conversation.messages.pop();
  if (conversation.leaf === message.id) {
    const sibling = conversation.messages.findLast((other) => other.parent === message.parent);
    if (sibling) choose(conversation, sibling);
    else conversation.leaf = message.parent;
  }
}

/** The messages that are shown, from the first. */
export function path(conversation, leaf = conversation.leaf) {
  const messages = [];
  for (let id = leaf; id !== null; id = conversation.messages[id].parent) messages.unshift(conversation.messages[id]);
  return messages;
}

/** A message and those that stand in its place on other branches, in the order in which they came. */
export function siblings(conversation, message) {
  return conversation.messages.filter((other) => other.parent === message.parent);
}

/** Show the latest branch that goes through a message. */
export function choose(conversation, message) {
  let leaf = message;
  for (let next = leaf; next; next = conversation.messages.findLast((other) => other.parent === leaf.id)) leaf = next;
  conversation.leaf = leaf.id;
}

/** The shown path as a document in Markdown. */
export function markdown(conversation) {
  const parts = path(conversation).map(
    ({ role, content }) => `## ${role === "user" ? "You" : "Model"}\n\n${content.trim()}\n`,
  );
  return [`# ${conversation.title}\n`, ...parts].join("\n");
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1).trimEnd()}…` : line;
}
