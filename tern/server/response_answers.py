"""The answers of /v1/responses as JSON, whole and as events. Both are made of the same parts.

Knows OpenAI's items and events; knows no engine and no HTTP.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tern.chat import Tokenizer
from tern.engine import FinishReason, GeneratedToken, SamplingParams
from tern.server.body import JsonObject
from tern.server.errors import answer_for
from tern.server.logprobs import chat_logprobs, token_bytes
from tern.server.parts import Closed, Grown, Opened, Part, PartKind, PartReader, Step
from tern.server.schemas.responses import ResponsesRequest
from tern.server.sink import Ending, Update
from tern.server.streaming import named_sse
from tern.server.usage import total_usage

ID_PREFIXES = {PartKind.THOUGHT: "rs", PartKind.TEXT: "msg", PartKind.CALL: "fc"}


@dataclass(frozen=True)
class ResponseForm:
    """What the answer says of its request. `created` is in seconds since 1970."""

    answer_id: str
    created: int
    model: str
    request: ResponsesRequest
    params: SamplingParams
    tokenizer: Tokenizer

    def envelope(self, status: str, output: list[JsonObject], **more: Any) -> JsonObject:
        """The response as it stands."""
        request, params = self.request, self.params
        return {
            "id": self.answer_id,
            "object": "response",
            "created_at": self.created,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self.model,
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning and request.reasoning.effort, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": (request.text and request.text.format) or {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_logprobs": request.num_top or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            **more,
        }

    def logprobs(self, tokens: Sequence[GeneratedToken]) -> list[JsonObject]:
        """The log-probabilities of a text's tokens, if the request wants them."""
        if self.request.num_top is None:
            return []
        entries: list[JsonObject] = chat_logprobs(self.tokenizer, tokens, self.request.num_top)["content"]
        return entries


@dataclass
class ResponseWriter:
    """Writes one answer, whole or as a stream; an `AnswerWriter`."""

    form: ResponseForm
    silent = None

    _ids: list[str] = field(default_factory=list, init=False)
    _ending: Ending | None = field(default=None, init=False)
    _sent: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        form = self.form
        with_tokens = form.request.num_top is not None
        self._reader = PartReader(token_bytes=partial(token_bytes, form.tokenizer) if with_tokens else None)

    def whole(self, updates: Sequence[Update]) -> JsonObject:
        """The response in one piece."""
        for step in [*self._take(updates), *self._reader.close()]:
            if isinstance(step, Opened):
                self._name(step.part)
        return self._ended()

    def opening(self) -> Iterator[bytes]:
        """The response before anything is known of it."""
        for status in ("created", "in_progress"):
            yield self._event(f"response.{status}", response=self.form.envelope("in_progress", []))

    def chunks(self, updates: Sequence[Update]) -> Iterator[bytes]:
        """The events of what just came."""
        for step in self._take(updates):
            yield from self._step(step)

    def closing(self) -> Iterator[bytes]:
        """The end of the last item, and the response as it would have come whole."""
        for step in self._reader.close():
            yield from self._step(step)
        response = self._ended()
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, error: Exception) -> Iterator[bytes]:
        """What went wrong, and the response as far as it came."""
        found = answer_for(error)
        yield self._event("error", code=found.code, message=found.message, param=found.param)
        problem = {"code": "server_error", "message": found.message}
        yield self._event("response.failed", response=self.form.envelope("failed", self._output(), error=problem))

    def _take(self, updates: Sequence[Update]) -> list[Step]:
        for update in updates:
            self._ending = update.ending or self._ending
        return self._reader.take(updates)

    def _ended(self) -> JsonObject:
        assert self._ending is not None, "a response is finished when its choice has ended"
        cut = self._ending.finish.reason is FinishReason.LENGTH
        usage = total_usage([[self._ending]])
        return self.form.envelope(
            "incomplete" if cut else "completed",
            self._output(),
            completed_at=None if cut else int(time.time()),
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            usage={
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning},
                "total_tokens": usage.prompt + usage.completion,
            },
        )

    def _output(self) -> list[JsonObject]:
        return [self._item(part, self._status(part)) for part in self._reader.parts]

    def _status(self, part: Part) -> str:
        last = part.index == len(self._reader.parts) - 1
        return "incomplete" if last and part.cut_by(self._ending) else "completed"

    def _name(self, part: Part) -> None:
        """One id for all that is ever said of an item."""
        self._ids.append(f"{ID_PREFIXES[part.kind]}_{uuid.uuid4().hex}")

    def _step(self, step: Step) -> Iterator[bytes]:
        match step:
            case Opened(part):
                self._name(part)
                yield from self._opened(part)
            case Grown(part, text, tokens):
                yield self._grown(part, text, tokens)
            case Closed(part):
                yield from self._closed(part)

    def _opened(self, part: Part) -> Iterator[bytes]:
        begun = Part(part.kind, part.index, part.call_id, part.name)
        item = self._item(begun, "in_progress")
        if part.kind is PartKind.CALL:
            yield self._event("response.output_item.added", output_index=part.index, item=item)
            return
        yield self._event("response.output_item.added", output_index=part.index, item={**item, "content": []})
        yield self._event("response.content_part.added", **self._at(part), part=self._content(begun))

    def _grown(self, part: Part, text: str, tokens: Sequence[GeneratedToken]) -> bytes:
        match part.kind:
            case PartKind.THOUGHT:
                return self._event("response.reasoning_text.delta", **self._at(part), delta=text)
            case PartKind.TEXT:
                logprobs = self.form.logprobs(tokens)
                return self._event("response.output_text.delta", **self._at(part), delta=text, logprobs=logprobs)
            case PartKind.CALL:
                return self._event("response.function_call_arguments.delta", **self._of(part), delta=text)

    def _closed(self, part: Part) -> Iterator[bytes]:
        text = part.text
        match part.kind:
            case PartKind.THOUGHT:
                yield self._event("response.reasoning_text.done", **self._at(part), text=text)
            case PartKind.TEXT:
                logprobs = self.form.logprobs(part.tokens)
                yield self._event("response.output_text.done", **self._at(part), text=text, logprobs=logprobs)
            case PartKind.CALL:
                done = "response.function_call_arguments.done"
                yield self._event(done, **self._of(part), name=part.name, arguments=text)
        if part.kind is not PartKind.CALL:
            yield self._event("response.content_part.done", **self._at(part), part=self._content(part))
        item = self._item(part, self._status(part))
        yield self._event("response.output_item.done", output_index=part.index, item=item)

    def _item(self, part: Part, status: str) -> JsonObject:
        item: JsonObject = {"id": self._ids[part.index], "status": status}
        match part.kind:
            case PartKind.THOUGHT:
                return {"type": "reasoning", **item, "summary": [], "content": [self._content(part)]}
            case PartKind.TEXT:
                return {"type": "message", **item, "role": "assistant", "content": [self._content(part)]}
            case PartKind.CALL:
                call = {"call_id": part.call_id, "name": part.name, "arguments": part.text}
                return {"type": "function_call", **item, **call}

    def _content(self, part: Part) -> JsonObject:
        if part.kind is PartKind.THOUGHT:
            return {"type": "reasoning_text", "text": part.text}
        logprobs = self.form.logprobs(part.tokens)
        return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": logprobs}

    def _of(self, part: Part) -> JsonObject:
        return {"item_id": self._ids[part.index], "output_index": part.index}

    def _at(self, part: Part) -> JsonObject:
        return {**self._of(part), "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = named_sse({"type": kind, "sequence_number": self._sent, **fields})
        self._sent += 1
        return event
