/** The server, as the page uses it: the model's name, and replies as they come. */

/** Something went wrong, in words for the user. status is HTTP's, 0 where there was no answer. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const TEXT_TOKENS = 512; // of a continued text, where no limit is set: the API's own is 16

export class Server {
  key = null;
  /** {name, context, chats}: chats is false for a model without a chat template, which continues texts. */
  model = null;

  async connect() {
    const { data } = await (await this.#fetch("/v1/models")).json();
    const { id, meta } = data[0];
    this.model = { name: id, context: meta.n_ctx, chats: meta.has_chat_template };
  }

  /**
   * The reply to messages, [{role, content}, ...], in pieces: {reasoning}, {content}, {progress} of reading the prompt,
   * {ending}, {timings}, {usage}. Raises ServerError, and AbortError once the signal says so, which ends the work on the
   * server as well.
   */
  async *reply(messages, settings, signal) {
    const [path, body] = this.model.chats ? chatRequest(messages, settings) : textRequest(messages, settings);
    const response = await this.#fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...body, stream: true, return_progress: true, stream_options: { include_usage: true } }),
      signal,
    });
    for await (const chunk of documents(response, signal)) {
      if (chunk.error) throw new ServerError(chunk.error.message);
      yield* pieces(chunk);
    }
  }

  async #fetch(path, options = {}) {
    const headers = { ...options.headers, ...(this.key ? { authorization: `Bearer ${this.key}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new ServerError("The server does not answer. Is it still running?");
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

function chatRequest(messages, settings) {
  const { system, thinking } = settings;
  const first = system.trim() ? [{ role: "system", content: system }] : [];
  const body = { messages: [...first, ...messages], ...sampling(settings) };
  if (thinking) body.enable_thinking = thinking === "on";
  return ["/v1/chat/completions", body];
}

function textRequest(messages, settings) {
  const prompt = messages.map(({ content }) => content).join("");
  return ["/v1/completions", { max_tokens: TEXT_TOKENS, ...sampling(settings), prompt }];
}

function sampling(settings) {
  const given = ["temperature", "top_p", "max_tokens"].filter((name) => settings[name] !== "");
  return Object.fromEntries(given.map((name) => [name, Number(settings[name])]));
}

function* pieces(chunk) {
  const choice = chunk.choices?.[0];
  const { reasoning_content: reasoning, content = choice?.text } = choice?.delta ?? {};
  if (chunk.prompt_progress) yield { progress: chunk.prompt_progress };
  if (reasoning) yield { reasoning };
  if (content) yield { content };
  if (choice?.finish_reason) yield { ending: choice.finish_reason };
  if (chunk.timings) yield { timings: chunk.timings };
  if (chunk.usage) yield { usage: chunk.usage };
}

/** The documents of a stream of server-sent events. */
async function* documents(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  while (true) {
    const { done, value } = await next(reader, signal);
    if (done) throw new ServerError("The connection was lost before the reply ended.");
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

async function next(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ServerError("The connection was lost before the reply ended.");
  }
}

async function refusal(response) {
  let message;
  try {
    message = (await response.json()).error.message;
  } catch {
    message = `${response.status} ${response.statusText}`;
  }
  const wait = response.headers.get("retry-after");
  if (response.status === 429) message = `The server is busy: ${message}${wait ? "" : "."}`;
  return new ServerError(message, response.status);
}
