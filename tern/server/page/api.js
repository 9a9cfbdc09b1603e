// Asks the server. Knows HTTP, server-sent events and the API's envelope of errors; knows no conversation and no DOM.

const BASE = new URL(".", document.baseURI);

/** What went wrong, as a sentence. `status` is 0 where no answer came; `key` names a sentence of texts.js in its place. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, key = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, key, retryAfter });
  }
}

async function ask(path, apiKey, options) {
  const headers = { ...options.headers };
  if (apiKey) headers.Authorization = `Bearer ${encodeKey(apiKey)}`;
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(error.message, { key: "unreachable" });
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

/** Headers hold bytes: a key beyond ASCII goes as its UTF-8, which is what the server compares. */
function encodeKey(key) {
  return String.fromCharCode(...new TextEncoder().encode(key));
}

async function errorOf(response) {
  const text = await response.text();
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  try {
    const { message, code } = JSON.parse(text).error;
    return new ApiError(message, { status: response.status, code, retryAfter });
  } catch {
    return new ApiError(`${response.status} ${response.statusText}`, { status: response.status, retryAfter });
  }
}

/** The served model's entry: its name as `id`, its length in tokens as `max_model_len`. */
export async function servedModel(apiKey) {
  const response = await ask("v1/models", apiKey, {});
  return (await response.json()).data[0];
}

/**
 * Every chunk of a streamed chat. Throws ApiError where the server refuses, and where it gives up on the way; leaving
 * the loop or aborting `signal` closes the connection, which ends the work on the server.
 */
export async function* streamChat(body, { apiKey, signal }) {
  const response = await ask("v1/chat/completions", apiKey, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
  let ended = false;
  for await (const data of eventData(response.body, signal)) {
    if (data === "[DONE]") {
      ended = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, { status: 500, code: chunk.error.code });
    yield chunk;
  }
  if (!ended) throw new ApiError("the stream broke off", { key: "brokenOff" });
}

/** The data of each server-sent event; comments are skipped, and an event may be cut anywhere into network reads. */
export async function* eventData(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await read(reader, signal);
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => undefined); // already broken, if it fails
  }
}

async function read(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal?.aborted) throw new DOMException("stopped", "AbortError");
    throw new ApiError(error.message, { key: "brokenOff" });
  }
}
