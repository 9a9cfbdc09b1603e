// A turn: answer, results of tools, answer again, until the model has nothing left to ask. Knows no DOM.

import { AnswerWriter, emptyAnswer } from "./answer.js";
import { ApiError, streamChat } from "./api.js";
import { awaitsAnswer, openCalls, requestFor } from "./conversation.js";
import { resultOf } from "./tools.js";

/** Answers in a row that the page asks for by itself; a model that calls tools without end is then left to its user. */
export const MAX_ROUNDS = 12;

/**
 * One run over a conversation, which it adds messages to. `options()` gives `{settings, tools, userTools, apiKey}` anew
 * for each request; `on.added(message)`, `on.grew(message)` and `on.ended(message)` say what changed.
 */
export class Turn {
  #stopper = new AbortController();

  constructor(conversation, options, on) {
    Object.assign(this, { conversation, options, on });
  }

  /** End the answer where it is; what came so far stays. */
  stop() {
    this.#stopper.abort();
  }

  /** Go on until the model has answered, the user is asked for a result, or something fails. */
  async run() {
    for (let round = 0; round < MAX_ROUNDS; round++) {
      this.#giveResults();
      if (!awaitsAnswer(this.conversation) || !(await this.#answer())) return;
    }
  }

  #giveResults() {
    for (const call of openCalls(this.conversation)) {
      const result = resultOf(call, this.options().userTools);
      if (!result) continue;
      const message = { role: "tool", id: call.id, name: call.name, ...result };
      this.conversation.messages.push(message);
      this.on.added(message);
    }
  }

  /** One request; false if it failed or was stopped. */
  async #answer() {
    const { settings, tools, apiKey } = this.options();
    const body = requestFor(this.conversation, settings, tools);
    const answer = emptyAnswer();
    const writer = new AnswerWriter(answer, Date.now());
    this.conversation.messages.push(answer);
    this.on.added(answer);
    try {
      for await (const chunk of streamChat(body, { apiKey, signal: this.#stopper.signal })) {
        writer.take(chunk, Date.now());
        this.on.grew(answer);
      }
    } catch (error) {
      if (error.name === "AbortError") answer.finish = "stopped";
      else if (error instanceof ApiError) answer.error = { message: error.message, key: error.key, status: error.status, retryAfter: error.retryAfter };
      else throw error;
    } finally {
      writer.end(Date.now());
      this.on.ended(answer);
    }
    return answer.error === null && answer.finish !== "stopped";
  }
}
