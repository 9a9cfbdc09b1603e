"""The fields of sampling, which chats and completions share, and how they become `SamplingParams`.

Here only types are checked, and the checkpoint's own defaults fill what the request leaves out. Ranges, and what is in
lists and objects, are checked there, once: pydantic would collect a complaint about each of a million wrong items.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from tern.engine import SamplingParams
from tern.errors import InvalidRequestError
from tern.server.schemas.fields import Schema
from tern.server.schemas.structured import StructuredFields

NUMBER = "a number"
WHOLE = "a whole number"
FLAG = "true or false"
NAME = "text"
IDS = "a list of token ids"

MAX_PRIORITY = 2**31 - 1
MAX_ID_DIGITS = 10


class StreamOptions(Schema):
    """What a stream carries besides the answer."""

    include_usage: bool = Field(False, description=FLAG)
    continuous_usage_stats: bool = Field(False, description=FLAG)
    include_obfuscation: bool = Field(False, description=FLAG)


class SamplingFields(StructuredFields):
    """How tokens are chosen and when they end; vLLM's names where OpenAI has none."""

    model: str | None = Field(None, description=NAME)
    stream: bool = Field(False, description=FLAG)
    stream_options: StreamOptions | None = Field(None, description="an object, such as {'include_usage': true}")
    n: int = Field(1, description=WHOLE)
    max_tokens: int | None = Field(None, description=WHOLE)
    temperature: float | None = Field(None, description=NUMBER)
    top_p: float | None = Field(None, description=NUMBER)
    top_k: int | None = Field(None, description=WHOLE)
    min_p: float | None = Field(None, description=NUMBER)
    frequency_penalty: float | None = Field(None, description=NUMBER)
    presence_penalty: float | None = Field(None, description=NUMBER)
    repetition_penalty: float | None = Field(None, description=NUMBER)
    logit_bias: dict[str, Any] | None = Field(None, description="an object of token id to number")
    bad_words: list[Any] | None = Field(None, description="a list of texts")
    seed: int | None = Field(None, description=WHOLE)
    stop: str | list[Any] | None = Field(None, description="text or a list of texts")
    stop_token_ids: list[Any] | None = Field(None, description=IDS)
    include_stop_str_in_output: bool = Field(False, description=FLAG)
    ignore_eos: bool = Field(False, description=FLAG)
    min_tokens: int = Field(0, description=WHOLE)
    skip_special_tokens: bool = Field(True, description=FLAG)
    priority: int = Field(0, description=WHOLE)
    return_token_ids: bool = Field(False, description=FLAG)

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_always(self) -> bool:
        """Whether every chunk of a stream carries the usage so far."""
        return self.usage_at_end and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def check_common(self) -> None:
        """Refuse a priority out of range, and options of a stream where none is asked for."""
        if abs(self.priority) > MAX_PRIORITY:
            raise InvalidRequestError(
                f"priority is {self.priority}: it must be from -{MAX_PRIORITY} to {MAX_PRIORITY}.", param="priority"
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options is given but stream is not true: set stream, or leave stream_options out.",
                param="stream_options",
            )

    def sampling_params(self, defaults: Mapping[str, Any], **settled: Any) -> SamplingParams:
        """The parameters for the engine: `settled` by the API family, else as requested, else the checkpoint's."""
        given = {
            name: value
            for name in SamplingParams.__dataclass_fields__
            if name in self.model_fields_set
            and name not in StructuredFields.model_fields  # the door makes a grammar of those
            and (value := getattr(self, name)) is not None
        }
        if self.logit_bias is not None:
            given["logit_bias"] = _token_keys(self.logit_bias)
        return SamplingParams(**{**defaults, **given, **settled})


def _token_keys(biases: Mapping[str, Any]) -> dict[int, Any]:
    """JSON keys are text; token ids are numbers."""
    for key in biases:
        if not (key.isascii() and key.isdecimal() and len(key) <= MAX_ID_DIGITS):
            raise InvalidRequestError(
                f"logit_bias has the key {key[:40]!r}: each key must be a token id in digits.", param="logit_bias"
            )
    return {int(key): bias for key, bias in biases.items()}
