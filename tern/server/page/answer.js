// Turns the chunks of a stream into a message of a conversation, with its counts and times. Pure: no DOM, no clock of its own.

/** A message that nothing has been said in yet. */
export function emptyAnswer() {
  return { role: "assistant", content: "", reasoning: "", calls: [], finish: null, error: null, stats: {} };
}

/**
 * Adds chunks to an answer. `stats`, times in milliseconds: `start`, `first` and `last` token, when the thought began
 * and ended (`thoughtStart`, `thoughtEnd`); tokens: `prompt`, `cached`, `completion`, `thought`.
 */
export class AnswerWriter {
  constructor(answer, start) {
    this.answer = answer;
    answer.stats = { start };
  }

  /** Take one chunk that came at `now`. */
  take(chunk, now) {
    const { answer } = this;
    const { stats } = answer;
    if (chunk.usage) this.count(chunk.usage);
    for (const { delta, finish_reason } of chunk.choices ?? []) {
      const thought = delta.reasoning_content ?? "";
      const said = Boolean(delta.content || delta.tool_calls?.length);
      if (thought || said) {
        stats.first ??= now;
        stats.last = now;
      }
      if (thought) this.think(thought, now);
      if (said || finish_reason) stats.thoughtEnd ??= stats.thoughtStart === undefined ? undefined : now;
      answer.content += delta.content ?? "";
      for (const piece of delta.tool_calls ?? []) this.call(piece);
      if (finish_reason) answer.finish = finish_reason;
    }
  }

  think(text, now) {
    const { stats } = this.answer;
    this.answer.reasoning += text;
    stats.thoughtStart ??= now;
    if (stats.completion !== undefined) stats.thought = stats.completion;
  }

  call({ index, id, function: { name, arguments: piece } }) {
    const { calls } = this.answer;
    calls[index] ??= { id, name, arguments: "" };
    calls[index].arguments += piece ?? "";
  }

  count(usage) {
    const { stats } = this.answer;
    stats.prompt = usage.prompt_tokens;
    stats.completion = usage.completion_tokens;
    if (usage.prompt_tokens_details) stats.cached = usage.prompt_tokens_details.cached_tokens;
    if (usage.completion_tokens_details && this.answer.finish) stats.thought = usage.completion_tokens_details.reasoning_tokens;
  }

  /** The stream is over, in whichever way. */
  end(now) {
    const { stats } = this.answer;
    if (stats.thoughtStart !== undefined) stats.thoughtEnd ??= now;
  }
}

const SHORTEST = 100; // milliseconds; what came in less is one burst of the network, and no rate

/** Tokens a second between the first and the last token; undefined while there is too little to tell. */
export function speed({ first, last, completion }) {
  return completion > 1 && last - first >= SHORTEST ? ((completion - 1) * 1000) / (last - first) : undefined;
}
