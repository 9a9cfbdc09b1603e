"""The answers of /v1/completions as JSON, whole and in chunks. Knows OpenAI's shapes; knows no engine and no HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tern.chat import ContentDelta, Tokenizer
from tern.engine import FinishReason, GeneratedToken, ScoredToken
from tern.server.body import JsonObject
from tern.server.generation import Generation
from tern.server.logprobs import LegacyLogprobs, prompt_logprobs
from tern.server.progress import Progress, by_choice
from tern.server.sink import Ending, Update
from tern.server.streaming import DONE, sse, with_comments
from tern.server.usage import running_usage, total_usage


@dataclass(frozen=True)
class CompletionShape:
    """What the request says about the form of its answer.

    `echoes[i]` is the text of prompt i if it is wanted before its completions, else empty. Choice c belongs to prompt
    `c // choices_each`. `num_top` is None when no log-probabilities are wanted, `num_prompt_top` when none of the
    prompt are wanted apart from those of what is echoed. `tokens_as_ids`: they call tokens by their ids.
    """

    answer_id: str
    created: int
    model: str
    tokenizer: Tokenizer
    prompts: tuple[tuple[int, ...], ...]
    echoes: tuple[str, ...]
    choices_each: int
    num_top: int | None
    skip_special_tokens: bool
    token_ids: bool
    usage_at_end: bool
    usage_always: bool
    num_prompt_top: int | None = None
    tokens_as_ids: bool = False

    @property
    def choices(self) -> int:
        """Number of choices in all."""
        return len(self.prompts) * self.choices_each

    def prompt_of(self, index: int) -> int:
        """The prompt that a choice belongs to."""
        return index // self.choices_each

    def envelope(self, choices: list[JsonObject]) -> JsonObject:
        """What every answer and chunk begins with."""
        return {
            "id": self.answer_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def logprobs(self, num_top: int) -> LegacyLogprobs:
        """What makes the log-probabilities of one choice."""
        return LegacyLogprobs(
            self.tokenizer, num_top, skip_special_tokens=self.skip_special_tokens, as_ids=self.tokens_as_ids
        )

    def usage(self, endings: dict[int, Ending]) -> JsonObject:
        """The usage of all choices, once all have ended."""
        each = self.choices_each
        return total_usage(
            [endings[prompt * each + choice] for choice in range(each)] for prompt in range(len(self.prompts))
        ).json()


class ChoiceWriter:
    """One choice's pieces of answer: the whole answer is its only piece."""

    def __init__(self, shape: CompletionShape, index: int) -> None:
        self._shape = shape
        self._index = index
        self._prompt_ids = shape.prompts[shape.prompt_of(index)]
        self._echo = shape.echoes[shape.prompt_of(index)]
        self._prompt: list[ScoredToken] = []
        self._logprobs = None if shape.num_top is None else shape.logprobs(shape.num_top)
        self._begun = False
        self._held: list[GeneratedToken] = []

    def piece(self, progress: Progress) -> JsonObject | None:
        """The choice's next piece, or None while there is nothing to say; tokens wait for the text they are part of."""
        self._prompt += progress.prompt
        self._held += progress.tokens
        text = "".join(event.text for event in progress.events if isinstance(event, ContentDelta))
        if not text and progress.ending is None:
            return None
        tokens, self._held = self._held, []
        piece: JsonObject = {
            "index": self._index,
            "text": self._echo + text,
            "logprobs": None if self._logprobs is None else self._lists(self._logprobs, tokens),
            "finish_reason": None,
            "stop_reason": None,
        }
        if self._shape.token_ids:
            piece["token_ids"] = [token.token_id for token in tokens]
            if not self._begun:
                piece["prompt_token_ids"] = list(self._prompt_ids)
        if self._shape.num_prompt_top is not None:
            piece["prompt_logprobs"] = prompt_logprobs(self._shape.tokenizer, self._prompt, self._shape.num_prompt_top)
        self._begun, self._echo = True, ""
        if progress.ending is not None:
            length = progress.ending.finish.reason is FinishReason.LENGTH
            piece["finish_reason"] = "length" if length else "stop"
            piece["stop_reason"] = progress.ending.stop_reason
        return piece

    def _lists(self, logprobs: LegacyLogprobs, tokens: Sequence[GeneratedToken]) -> JsonObject:
        """The log-probabilities of the piece; what is echoed stands in its first."""
        if not self._echo:
            return logprobs.lists(tokens)
        return logprobs.with_prompt(self._echo, [ScoredToken(self._prompt_ids[0]), *self._prompt], tokens)


def whole_answer(shape: CompletionShape, updates: Iterable[Update]) -> JsonObject:
    """The answer of a request that does not stream, from all updates of all its choices."""
    progress = by_choice(updates)
    pieces = [ChoiceWriter(shape, index).piece(progress[index]) for index in range(shape.choices)]
    endings = {index: each.ending for index, each in progress.items() if each.ending is not None}
    answer = shape.envelope([piece for piece in pieces if piece is not None])
    answer["usage"] = shape.usage(endings)
    return answer


class CompletionChunks:
    """Turns updates into the chunks of a stream."""

    def __init__(self, shape: CompletionShape) -> None:
        self._shape = shape
        self._writers = [ChoiceWriter(shape, index) for index in range(shape.choices)]
        self._generated = 0
        self._endings: dict[int, Ending] = {}

    def chunks(self, updates: Sequence[Update]) -> Iterator[bytes]:
        """The chunks for what just came."""
        self._generated += sum(update.token is not None for update in updates)
        for index, progress in by_choice(updates).items():
            if progress.ending is not None:
                self._endings[index] = progress.ending
            piece = self._writers[index].piece(progress)
            if piece is not None:
                yield sse(self._chunk(piece))

    def _chunk(self, piece: JsonObject) -> JsonObject:
        chunk = self._shape.envelope([piece])
        if self._shape.usage_always:
            chunk["usage"] = running_usage(sum(map(len, self._shape.prompts)), self._generated)
        elif self._shape.usage_at_end:
            chunk["usage"] = None
        return chunk

    def closing(self) -> Iterator[bytes]:
        """The chunk with the usage, if it is wanted, and the end of the stream."""
        if self._shape.usage_at_end:
            chunk = self._shape.envelope([])
            chunk["usage"] = self._shape.usage(self._endings)
            yield sse(chunk)
        yield DONE


async def stream_answer(shape: CompletionShape, generation: Generation, silence: float) -> AsyncIterator[bytes]:
    """Every event of a streamed answer; a comment after each `silence` seconds without one."""
    writer = CompletionChunks(shape)
    async for event in with_comments(generation, writer.chunks, silence):
        yield event
    for event in writer.closing():
        yield event
