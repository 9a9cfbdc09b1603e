"""What a checkpoint says about generating with it: where a text ends, and its authors' sampling defaults.

Knows `generation_config.json` and the token ids of `config.json`; knows no sampler. Of transformers' many keys only
those below are read; the others steer ways of decoding that Tern does not have (beams, contrastive search).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tern.checkpoint.json_file import read_json_object
from tern.errors import CheckpointError
from tern.model import ErnieConfig

FILE_NAME = "generation_config.json"
MIN_TOP_P = 1e-6
MIN_REPETITION_PENALTY = 0.01  # the sampler's own bound
MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class GenerationConfig:
    """The tokens that end a text, and the file's defaults under its own names, None where the checkpoint gives none.

    `top_k` 0 or below means no limit, as in transformers and vLLM. `max_new_tokens` is for whoever generates as
    transformers does; other doors let an answer grow as long as the model allows.
    """

    eos_token_ids: frozenset[int]
    do_sample: bool | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None

    def sampling_defaults(self) -> dict[str, Any]:
        """The defaults that the checkpoint does give, by the names of sampling parameters.

        Where it says `do_sample` false the temperature is 0, which is what transformers makes of that.
        """
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return given | {"temperature": 0.0} if self.do_sample is False else given

    @classmethod
    def from_directory(cls, directory: Path, config: ErnieConfig) -> GenerationConfig:
        """Read `generation_config.json`; without the file, or without `eos_token_id` in it, the config's eos counts.

        Raises `CheckpointError` that lists every value that cannot be.
        """
        path = directory / FILE_NAME
        return cls.from_dict(read_json_object(path) if path.exists() else {}, config)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], config: ErnieConfig) -> GenerationConfig:
        """The same from the contents of the file."""
        problems: list[str] = []
        generation = cls(
            eos_token_ids=_eos(raw.get("eos_token_id"), config, problems),
            do_sample=_boolean(raw, "do_sample", problems),
            max_new_tokens=_integer(raw, "max_new_tokens", 1, MAX_TOKENS, problems),
            temperature=_number(raw, "temperature", 0.0, 10.0, problems),
            top_p=_number(raw, "top_p", MIN_TOP_P, 1.0, problems),
            top_k=_integer(raw, "top_k", -1, 2**31 - 1, problems),
            repetition_penalty=_number(raw, "repetition_penalty", MIN_REPETITION_PENALTY, 10.0, problems),
        )
        if problems:
            raise CheckpointError(f"{FILE_NAME} has values that cannot be used:", problems=problems)
        return generation


def _eos(value: Any, config: ErnieConfig, problems: list[str]) -> frozenset[int]:
    if value is None:
        return frozenset(config.eos_token_ids)
    ids = value if isinstance(value, list) else [value]
    wrong = [item for item in ids if type(item) is not int or not 0 <= item < config.vocab_size]
    for item in wrong:
        problems.append(f"eos_token_id {str(item)[:40]} is no token: ids go from 0 to {config.vocab_size - 1}")
    return frozenset() if wrong else frozenset(ids)


def _number(raw: Mapping[str, Any], key: str, low: float, high: float, problems: list[str]) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
        problems.append(f"{key} is {str(value)[:40]}: it must be a number from {low:g} to {high:g}")
        return None
    return float(value)


def _boolean(raw: Mapping[str, Any], key: str, problems: list[str]) -> bool | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        problems.append(f"{key} is {str(value)[:40]}: it must be true or false")
        return None
    return value


def _integer(raw: Mapping[str, Any], key: str, low: int, high: int, problems: list[str]) -> int | None:
    value = raw.get(key)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        problems.append(f"{key} is {str(value)[:40]}: it must be a whole number from {low} to {high}")
        return None
    return value
