"""A prompt on its way through the engine, and what comes of it. Knows tokens, text and their sinks; runs nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tern.chat import CompiledGrammar, ParserState, TextStream, Tokenizer, parse_held_response, parse_response
from tern.engine import (
    CONTINUE,
    Finish,
    FinishReason,
    GeneratedToken,
    SamplingParams,
    ScoredToken,
    Steering,
    TokenLogprob,
)
from tern.offline.outputs import CompletionOutput, Logprob, RequestOutput


@dataclass
class Collector:
    """The sink of one sequence: keeps its tokens and lets the text stream decide about stops and steering.

    The text of `hidden_token_ids`, mostly the tokens that end the sequence, is no part of the output.
    """

    stream: TextStream
    hidden_token_ids: frozenset[int]
    tokens: list[GeneratedToken] = field(default_factory=list)
    prompt: list[ScoredToken] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finished: Finish | None = None

    def push(self, token: GeneratedToken) -> Steering:
        self.tokens.append(token)
        if token.token_id in self.hidden_token_ids and not token.forced:
            return CONTINUE
        step = self.stream.push(token.token_id)
        self.pieces.append(step.text)
        return Steering(stop=step.stop, force=step.force)

    def finish(self, finish: Finish) -> None:
        self.pieces.append(self.stream.finish())
        self.finished = finish


@dataclass
class Job:
    """One prompt on its way through the engine, with a collector for each of its `n` choices.

    `state` is where in a response the prompt of a chat ends, None for a plain prompt.
    """

    request_id: str
    text: str | None
    token_ids: tuple[int, ...]
    params: SamplingParams
    state: ParserState | None
    tools: list[dict[str, Any]] | None
    collectors: list[Collector]
    grammar: CompiledGrammar | None = None


def output_of(job: Job, tokenizer: Tokenizer) -> RequestOutput:
    """What a job whose requests have all ended gave."""
    outputs = [_completion(index, collector, job, tokenizer) for index, collector in enumerate(job.collectors)]
    cached = max((c.finished.num_cached_tokens for c in job.collectors if c.finished), default=0)
    scores: list[dict[int, Logprob] | None] | None = None
    if job.params.prompt_logprobs is not None:
        scores = [None, *(_logprobs(token, tokenizer) for token in job.collectors[0].prompt)]
    return RequestOutput(
        job.request_id,
        job.text,
        list(job.token_ids),
        outputs,
        num_cached_tokens=cached,
        prompt_logprobs=scores,
    )


def _completion(index: int, collector: Collector, job: Job, tokenizer: Tokenizer) -> CompletionOutput:
    finish = collector.finished
    assert finish is not None, "the engine went idle without finishing a request"
    text = "".join(collector.pieces)
    parse = parse_response if job.params.structured_outputs is None else parse_held_response
    wants_logprobs = job.params.logprobs is not None
    chosen = [token.logprob.logprob if token.logprob else 0.0 for token in collector.tokens]
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=[token.token_id for token in collector.tokens],
        cumulative_logprob=sum(chosen) if wants_logprobs else None,
        logprobs=[_logprobs(token, tokenizer) for token in collector.tokens] if wants_logprobs else None,
        finish_reason=str(finish.reason),
        stop_reason=collector.stream.stop_string or _stop_token(finish, job.params),
        error=finish.message if finish.reason is FinishReason.ERROR else None,
        message=parse(text, tools=job.tools, start=job.state) if job.state else None,
    )


def _stop_token(finish: Finish, params: SamplingParams) -> int | None:
    return finish.stop_token_id if finish.stop_token_id in params.stop_token_ids else None


def _logprobs(token: ScoredToken, tokenizer: Tokenizer) -> dict[int, Logprob]:
    candidates = [token.logprob or TokenLogprob(token.token_id, 0.0, 1), *token.top_logprobs]
    decode = tokenizer.token_text
    return {each.token_id: Logprob(each.logprob, each.rank, decode(each.token_id)) for each in candidates}
