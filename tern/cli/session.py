"""A model opened for one terminal: answers one conversation at a time and hands out the events while they come.

Knows the engine and the text protocol; `terminal` knows how events look.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tern.chat import (
    ChatProtocol,
    ContentDelta,
    ParsedMessage,
    RenderedPrompt,
    ResponseEvent,
    ResponseParser,
    TextStream,
    collect_message,
)
from tern.checkpoint import resolve_model
from tern.engine import Engine, EngineOptions, Finish, FinishReason, GeneratedToken, Request, SamplingParams, Steering
from tern.errors import EngineUnavailableError

OnEvents = Callable[[Sequence[ResponseEvent]], None]


@dataclass(frozen=True)
class Answer:
    """What came of one prompt. Seconds count from the request: to the last token, and to the first."""

    message: ParsedMessage
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    seconds: float
    first_token_seconds: float


@dataclass
class _EventSink:
    """Turns tokens into events as they come and passes them on."""

    stream: TextStream
    parser: ResponseParser | None  # None: plain text, all of it content
    on_events: OnEvents
    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    events: list[ResponseEvent] = field(default_factory=list)
    finished: Finish | None = None

    def push(self, token: GeneratedToken) -> Steering:
        if self.first_token is None:
            self.first_token = time.perf_counter()
        step = self.stream.push(token.token_id)
        self._emit(self._parse(step.text))
        return Steering(stop=step.stop, force=step.force)

    def finish(self, finish: Finish) -> None:
        self._emit(self._parse(self.stream.finish()) + (self.parser.finish() if self.parser else []))
        self.finished = finish

    def _parse(self, text: str) -> list[ResponseEvent]:
        if self.parser is not None:
            return self.parser.feed(text)
        return [ContentDelta(text)] if text else []

    def _emit(self, events: list[ResponseEvent]) -> None:
        if events:
            self.events += events
            self.on_events(events)


class Session:
    """An engine and a chat protocol for one model.

    Raises `CheckpointError` when the model cannot be opened, `OptionError` for wrong engine options.
    """

    def __init__(self, model: str | None, *, revision: str | None = None, **engine_options: Any) -> None:
        source = resolve_model(model, revision=revision)
        self.name = source.name
        self._engine = Engine.open(source, EngineOptions.for_one_caller(**engine_options))
        self._protocol = ChatProtocol.from_directory(source.directory, source.text_files)
        self._defaults = source.generation.sampling_defaults()
        self._ids = itertools.count()

    def sampling(self, **given: Any) -> SamplingParams:
        """Sampling values: those given (None counts as not given), else the checkpoint's own defaults."""
        return SamplingParams(
            **{
                "max_tokens": None,
                **self._defaults,
                **{name: value for name, value in given.items() if value is not None},
            }
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams,
        on_events: OnEvents,
        *,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> Answer:
        """Answer a conversation, calling `on_events` with each piece as it comes.

        A `KeyboardInterrupt` ends the answer early with what there is (`finish_reason` CANCELLED).
        """
        prompt = self._protocol.prompt(messages, tools=tools, template_kwargs=template_kwargs)
        return self._run(prompt, params, on_events, tools)

    def complete(self, text: str, params: SamplingParams, on_events: OnEvents) -> Answer:
        """Continue plain text, template and thought left out."""
        return self._run(self._protocol.plain_prompt(text), params, on_events, None)

    def _run(
        self,
        prompt: RenderedPrompt,
        params: SamplingParams,
        on_events: OnEvents,
        tools: list[dict[str, Any]] | None,
    ) -> Answer:
        stream = self._protocol.text_stream(params, prompt=prompt)
        parser = None if prompt.state is None else ResponseParser(tools=tools, start=prompt.state)
        sink = _EventSink(stream, parser, on_events)
        request = Request(
            request_id=f"terminal-{next(self._ids)}",
            prompt_token_ids=tuple(prompt.token_ids),
            params=params,
            sink=sink,
        )
        self._engine.add(request)
        try:
            while self._engine.has_work:
                self._engine.step()
        except KeyboardInterrupt:
            self._engine.cancel(request.request_id)
        return _answer(sink)


def _answer(sink: _EventSink) -> Answer:
    finish = sink.finished
    if finish is None or finish.reason is FinishReason.ERROR:
        raise EngineUnavailableError((finish and finish.message) or "The engine ended without an answer.")
    now = time.perf_counter()
    return Answer(
        message=collect_message(sink.events),
        finish_reason=finish.reason,
        prompt_tokens=finish.num_prompt_tokens,
        cached_tokens=finish.num_cached_tokens,
        completion_tokens=finish.num_generated_tokens,
        reasoning_tokens=sink.stream.num_reasoning_tokens,
        seconds=now - sink.started,
        first_token_seconds=(sink.first_token or now) - sink.started,
    )
