"""The settings of transformers' `generate`: which are served, and what they come to when several places state them.

Knows names and values; knows no tensors but the streamer's and no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict, cast

import torch

from tern.errors import OptionError

# transformers' own defaults, where neither the caller nor the checkpoint says anything.
DEFAULT_NEW_TOKENS = 20
DEFAULT_TOP_K = 50


class Streamer(Protocol):
    """What transformers calls a streamer: takes the prompt [1, tokens] first, then each new token [1]."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


class GenerateSettings(TypedDict, total=False):
    """The settings of transformers' `generate` that are served, as keywords or in a `generation_config`."""

    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    num_return_sequences: int | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    use_cache: bool | None


# Settings that would change the answer and are not served: the value of each that changes nothing.
_NEUTRAL: dict[str, object] = {
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "top_h": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "min_length": 0,
    "max_time": None,
    "stop_strings": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "return_dict_in_generate": False,
}


def merged_settings(config: Any, given: GenerateSettings) -> GenerateSettings:
    """The caller's keywords, then what a generation config states; raises `OptionError` for what is not served."""
    if config is not None and not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise OptionError(f"generation_config is {config!r:.80}: give transformers' GenerationConfig or a dict.")
    stated = {} if config is None else dict(config) if isinstance(config, Mapping) else config.to_dict()
    unknown = sorted(given.keys() - GenerateSettings.__annotations__.keys() - _NEUTRAL.keys())
    if unknown:
        raise OptionError(f"generate got {', '.join(unknown)}, which Tern does not know: leave it out.")
    said = {name: value for name, value in given.items() if value is not None}
    wanted = {name: value for name, value in stated.items() if value is not None} | said
    for name, neutral in _NEUTRAL.items():
        if wanted.get(name, neutral) != neutral:
            raise OptionError(f"{name} is {wanted[name]!r:.80}, which Tern's generate does not serve: leave it out.")
    return cast(GenerateSettings, wanted)
