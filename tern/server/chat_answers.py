"""The answers of /v1/chat/completions as JSON, whole and in chunks. Both are made of the same events.

Knows OpenAI's shapes; knows no engine and no HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tern.chat import ContentDelta, ReasoningDelta, ResponseEvent, Tokenizer, ToolCallDelta, collect_message
from tern.engine import FinishReason, GeneratedToken
from tern.server.body import JsonObject
from tern.server.generation import Generation
from tern.server.logprobs import chat_logprobs
from tern.server.progress import Progress, by_choice
from tern.server.sink import Ending, Update
from tern.server.streaming import DONE, sse, with_comments
from tern.server.usage import running_usage, total_usage


@dataclass(frozen=True)
class ChatShape:
    """What the request says about the form of its answer. `num_top` is None when no log-probabilities are wanted.

    With a `named_call` a call is no reason to end: OpenAI says "stop" then.
    """

    answer_id: str
    created: int
    model: str
    tokenizer: Tokenizer
    prompt_token_ids: tuple[int, ...]
    choices: int
    num_top: int | None
    token_ids: bool
    usage_at_end: bool
    usage_always: bool
    named_call: bool = False

    def envelope(self, kind: str, choices: list[JsonObject]) -> JsonObject:
        """What every answer and chunk begins with."""
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def extras(self, tokens: Sequence[GeneratedToken]) -> JsonObject:
        """What the request wants to know of these tokens besides their text."""
        wanted: JsonObject = {"logprobs": None}
        if self.num_top is not None and tokens:
            wanted["logprobs"] = chat_logprobs(self.tokenizer, tokens, self.num_top)
        if self.token_ids:
            wanted["token_ids"] = [token.token_id for token in tokens]
        return wanted


def whole_answer(shape: ChatShape, updates: Iterable[Update]) -> JsonObject:
    """The answer of a request that does not stream, from all updates of all its choices."""
    progress = by_choice(updates)
    choices = [_whole_choice(shape, index, progress[index]) for index in range(shape.choices)]
    endings = [ending for index in range(shape.choices) if (ending := progress[index].ending)]
    answer = shape.envelope("chat.completion", choices)
    answer["usage"] = total_usage([endings]).json()
    if shape.token_ids:
        answer["prompt_token_ids"] = list(shape.prompt_token_ids)
    return answer


def _whole_choice(shape: ChatShape, index: int, progress: Progress) -> JsonObject:
    parsed = collect_message(progress.events)
    message: JsonObject = {
        "role": "assistant",
        "content": parsed.content,
        "reasoning_content": parsed.reasoning_content,
        "reasoning": parsed.reasoning_content,
    }
    if parsed.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in parsed.tool_calls
        ]
    assert progress.ending is not None, "a whole answer is made when every choice has ended"
    return {
        "index": index,
        "message": message,
        **shape.extras(progress.tokens),
        **_end_fields(progress.ending, called=bool(parsed.tool_calls) and not shape.named_call),
    }


def _end_fields(ending: Ending, *, called: bool) -> JsonObject:
    """`finish_reason`, and vLLM's `stop_reason`: the stop string or stop token that ended the choice, if one did."""
    return {
        "finish_reason": _finish_reason(ending, called=called),
        "stop_reason": ending.stop_reason,
    }


def _finish_reason(ending: Ending, *, called: bool) -> str:
    if ending.finish.reason is FinishReason.LENGTH:
        return "length"
    # A call that was cut off is never called complete, whether by the limit or by a stop string inside its arguments.
    return "tool_calls" if called and not ending.inside_call else "stop"


class ChunkWriter:
    """Turns updates into the chunks of a stream: a role chunk for each choice, deltas, finish chunks, usage, DONE."""

    def __init__(self, shape: ChatShape) -> None:
        self._shape = shape
        self._called = [False] * shape.choices
        self._held: list[list[GeneratedToken]] = [[] for _ in range(shape.choices)]
        self._generated = 0
        self._endings: dict[int, Ending] = {}

    def opening(self) -> Iterator[bytes]:
        """The first chunk of each choice: it says who speaks, before anything is known of what."""
        for index in range(self._shape.choices):
            choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
            chunk = self._chunk([{**choice, "finish_reason": None}])
            if self._shape.token_ids:
                chunk["prompt_token_ids"] = list(self._shape.prompt_token_ids)
            yield sse(chunk)

    def chunks(self, updates: Sequence[Update]) -> Iterator[bytes]:
        """The chunks for what just came."""
        self._generated += sum(update.token is not None for update in updates)
        for index, progress in by_choice(updates).items():
            self._held[index] += progress.tokens
            for event in progress.joined_events():
                self._called[index] |= isinstance(event, ToolCallDelta)
                yield sse(self._chunk([self._delta(index, delta_of(event), {"finish_reason": None})]))
            if progress.ending is not None:
                self._endings[index] = progress.ending
                end = _end_fields(progress.ending, called=self._called[index] and not self._shape.named_call)
                yield sse(self._chunk([self._delta(index, {}, end)]))

    def closing(self) -> Iterator[bytes]:
        """The chunk with the usage, if it is wanted, and the end of the stream."""
        if self._shape.usage_at_end:
            chunk = self._shape.envelope("chat.completion.chunk", [])
            chunk["usage"] = total_usage([[self._endings[index] for index in range(self._shape.choices)]]).json()
            yield sse(chunk)
        yield DONE

    def _delta(self, index: int, delta: JsonObject, end: JsonObject) -> JsonObject:
        """One choice of a chunk; the tokens that came since the choice's last one go with it."""
        tokens, self._held[index] = self._held[index], []
        return {"index": index, "delta": delta, **self._shape.extras(tokens), **end}

    def _chunk(self, choices: list[JsonObject]) -> JsonObject:
        chunk = self._shape.envelope("chat.completion.chunk", choices)
        if self._shape.usage_always:
            chunk["usage"] = running_usage(len(self._shape.prompt_token_ids), self._generated)
        elif self._shape.usage_at_end:
            chunk["usage"] = None
        return chunk


def delta_of(event: ResponseEvent) -> JsonObject:
    """One event as the `delta` of a chunk; what it does not change is not named."""
    match event:
        case ReasoningDelta(text):
            return {"reasoning_content": text, "reasoning": text}
        case ContentDelta(text):
            return {"content": text}
        case ToolCallDelta(index, call_id, name, arguments):
            call: JsonObject = {"index": index, "function": {"arguments": arguments}}
            if name is not None:
                call = {
                    "index": index,
                    "id": call_id,
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
            return {"tool_calls": [call]}


async def stream_answer(shape: ChatShape, generation: Generation, silence: float) -> AsyncIterator[bytes]:
    """Every event of a streamed answer; a comment after each `silence` seconds without one."""
    writer = ChunkWriter(shape)
    for event in writer.opening():
        yield event
    async for event in with_comments(generation, writer.chunks, silence):
        yield event
    for event in writer.closing():
        yield event
