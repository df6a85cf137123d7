/** Replies on their way, at most one in a conversation; they go on while another conversation is shown. */

import { add, path, removeLast } from "./tree.js";

const SAVE_MS = 2000; // between two savings of a reply that comes

export class Replies {
  #server;
  #store;
  #listener;
  #running = new Map(); // id of a conversation -> {conversation, message, controller}
  #errors = new Map(); // id of a conversation -> what its last reply failed of

  /** listener: update(message), progress(conversation, text), change(conversation). */
  constructor(server, store, listener) {
    this.#server = server;
    this.#store = store;
    this.#listener = listener;
  }

  get busy() {
    return new Set(this.#running.keys());
  }

  /** The message that is being written in a conversation, or null. */
  of(conversation) {
    return this.#running.get(conversation.id)?.message ?? null;
  }

  error(conversation) {
    return this.#errors.get(conversation.id) ?? null;
  }

  /** Note what went wrong, null for nothing. */
  fail(conversation, error) {
    if (error) this.#errors.set(conversation.id, error);
    else this.#errors.delete(conversation.id);
  }

  stop(conversation) {
    this.#running.get(conversation.id)?.controller.abort();
  }

  /** Stop, and save nothing more: the conversation is deleted. */
  forget(conversation) {
    const running = this.#running.get(conversation.id);
    if (!running) return;
    running.isForgotten = true;
    running.controller.abort();
  }

  /** Save all that has come so far. */
  keepAll() {
    for (const { conversation } of this.#running.values()) this.#store.save(conversation);
  }

  /** Have the message `parent` answered, after what the settings say. */
  async start(conversation, parent, settings) {
    const asked = path(conversation, parent).map(({ role, content }) => ({ role, content }));
    const message = add(conversation, parent, "assistant");
    message.ending = "lost"; // what it is if the page is left
    const controller = new AbortController();
    const running = { conversation, message, controller, isForgotten: false };
    this.#running.set(conversation.id, running);
    this.fail(conversation, null);
    this.#listener.change(conversation);
    const saving = setInterval(() => running.isForgotten || this.#store.save(conversation), SAVE_MS);
    this.#store.save(conversation);
    try {
      await this.#write(conversation, message, this.#server.reply(asked, settings, controller.signal));
    } catch (error) {
      if (controller.signal.aborted) message.ending = "stopped";
      else this.fail(conversation, error);
    }
    clearInterval(saving);
    this.#running.delete(conversation.id);
    if (!message.content && !message.reasoning && message.ending !== "stop") removeLast(conversation);
    this.#listener.change(conversation);
    if (!running.isForgotten) await this.#store.save(conversation);
  }

  async #write(conversation, message, pieces) {
    const began = performance.now();
    let first = null;
    const stats = (message.stats = { generated: 0 });
    for await (const { reasoning, content, progress, ending, timings, usage } of pieces) {
      if (progress) this.#listener.progress(conversation, reading(progress));
      if (reasoning) message.reasoning += reasoning;
      if (content && message.reasoning && !message.content) message.thoughtFor = (performance.now() - began) / 1000;
      if (content) message.content += content;
      if (reasoning || content) {
        const now = performance.now();
        first ??= now;
        stats.generated += 1; // a piece is about a token; the server's own count comes with the end
        stats.perSecond = now > first ? (1000 * (stats.generated - 1)) / (now - first) : 0;
        this.#listener.progress(conversation, writing(stats));
        this.#listener.update(message);
      }
      if (ending) message.ending = ending;
      if (timings) noteTimings(stats, timings);
      if (usage) stats.total = usage.total_tokens;
    }
  }
}

function noteTimings(stats, timings) {
  stats.generated = timings.predicted_n;
  stats.perSecond = timings.predicted_per_second;
  stats.prompt = timings.cache_n + timings.prompt_n;
  stats.cached = timings.cache_n;
  stats.promptSeconds = timings.prompt_ms / 1000;
}

function reading({ processed, total }) {
  return `Reading ${Math.round((100 * processed) / total)}% · Esc stops`;
}

function writing({ generated, perSecond }) {
  return `${generated} tokens · ${perSecond.toFixed(perSecond < 10 ? 1 : 0)} tokens/s · Esc stops`;
}
