"""The answers of /v1/messages as JSON, whole and as events. Both are made of the same parts.

Knows Anthropic's blocks and events; knows no engine and no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

from tern.engine import FinishReason
from tern.server.body import JsonObject
from tern.server.errors import ANTHROPIC_PATH, answer_for
from tern.server.parts import Closed, Grown, Opened, Part, PartKind, PartReader, Step
from tern.server.sink import Ending, Update
from tern.server.streaming import named_sse
from tern.server.usage import total_usage

SIGNATURE = "dGVybg=="
"""What stands where Anthropic signs a thought. Nobody checks it here, but clients drop a thought that has none."""

PING = named_sse({"type": "ping"})


@dataclass(frozen=True)
class MessageForm:
    """What the answer says of its request. A thought `shown` but not `spelt_out` is an empty block."""

    answer_id: str
    model: str
    num_prompt_tokens: int
    shown: bool
    spelt_out: bool

    def envelope(self, content: list[JsonObject], usage: JsonObject, **end: str | None) -> JsonObject:
        """The message as it stands."""
        return {
            "id": self.answer_id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            **end,
            "usage": usage,
        }


@dataclass
class MessageWriter:
    """Writes one answer, whole or as a stream; an `AnswerWriter`."""

    form: MessageForm
    silent = PING

    _ending: Ending | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._reader = PartReader(frozenset() if self.form.shown else frozenset({PartKind.THOUGHT}))

    def whole(self, updates: Sequence[Update]) -> JsonObject:
        """The message in one piece."""
        self._take(updates)
        blocks = [self._block(part) for part in self._reader.parts]
        return self.form.envelope(blocks, self._usage(), **self._end())

    def opening(self) -> Iterator[bytes]:
        """The message before anything is known of it but its prompt."""
        usage = _usage(self.form.num_prompt_tokens, 0, 0)
        yield named_sse({"type": "message_start", "message": self.form.envelope([], usage)})

    def chunks(self, updates: Sequence[Update]) -> Iterator[bytes]:
        """The events of what just came."""
        for step in self._take(updates):
            yield from self._step(step)

    def closing(self) -> Iterator[bytes]:
        """The end of the last block, and what is known of the message now."""
        for step in self._reader.close():
            yield from self._step(step)
        yield named_sse({"type": "message_delta", "delta": self._end(), "usage": self._usage()})
        yield named_sse({"type": "message_stop"})

    def failed(self, error: Exception) -> Iterator[bytes]:
        """What went wrong."""
        yield named_sse(answer_for(error).body(ANTHROPIC_PATH))

    def _take(self, updates: Sequence[Update]) -> list[Step]:
        for update in updates:
            self._ending = update.ending or self._ending
        return self._reader.take(updates)

    def _step(self, step: Step) -> Iterator[bytes]:
        index = step.part.index
        match step:
            case Opened(part):
                block = self._block(Part(part.kind, index, part.call_id, part.name), begun=True)
                yield named_sse({"type": "content_block_start", "index": index, "content_block": block})
            case Grown(part, text):
                if part.kind is not PartKind.THOUGHT or self.form.spelt_out:
                    yield _delta(index, _piece(part.kind, text))
            case Closed(part):
                if part.kind is PartKind.THOUGHT:
                    yield _delta(index, {"type": "signature_delta", "signature": SIGNATURE})
                yield named_sse({"type": "content_block_stop", "index": index})

    def _block(self, part: Part, *, begun: bool = False) -> JsonObject:
        match part.kind:
            case PartKind.THOUGHT:
                thought = part.text if self.form.spelt_out else ""
                return {"type": "thinking", "thinking": thought, "signature": "" if begun else SIGNATURE}
            case PartKind.TEXT:
                return {"type": "text", "text": part.text}
            case PartKind.CALL:
                given = {} if begun else arguments_of(part.text)
                return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": given}

    def _end(self) -> dict[str, str | None]:
        assert self._ending is not None, "a message is finished when its choice has ended"
        reason, stop = self._ending.finish.reason, self._ending.stop_reason
        if reason is FinishReason.LENGTH:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        called = any(part.kind is PartKind.CALL for part in self._reader.parts)
        if called and not self._ending.inside_call:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if isinstance(stop, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        return {"stop_reason": "end_turn", "stop_sequence": None}

    def _usage(self) -> JsonObject:
        assert self._ending is not None, "a message is finished when its choice has ended"
        usage = total_usage([[self._ending]])
        thought = {"output_tokens_details": {"thinking_tokens": usage.reasoning}}
        return {**_usage(usage.prompt, usage.cached, usage.completion), **thought}


def _usage(prompt: int, cached: int, generated: int) -> JsonObject:
    """Anthropic counts what came from the cache apart from the rest of the prompt, and what went into it not here."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": generated,
    }


def _delta(index: int, delta: JsonObject) -> bytes:
    return named_sse({"type": "content_block_delta", "index": index, "delta": delta})


def _piece(kind: PartKind, text: str) -> JsonObject:
    match kind:
        case PartKind.THOUGHT:
            return {"type": "thinking_delta", "thinking": text}
        case PartKind.TEXT:
            return {"type": "text_delta", "text": text}
        case PartKind.CALL:
            return {"type": "input_json_delta", "partial_json": text}


def arguments_of(text: str) -> JsonObject:
    """A call's arguments as an object; of arguments that were cut off, those that are whole.

    Nothing at all where the text has a number that no JSON writer writes.
    """
    try:
        value: Any = from_json(text, allow_partial=True)
        json.dumps(value, allow_nan=False)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
