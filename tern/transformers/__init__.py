"""The transformers front door: `from tern.transformers import AutoModelForCausalLM, AutoTokenizer`.

Knows the names and shapes of transformers' API; runs on Tern's engine and does not import transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch

from tern.chat import ChatTemplate, Tokenizer
from tern.checkpoint import resolve_model
from tern.engine import Engine, EngineOptions
from tern.errors import OptionError
from tern.transformers.causal_lm import TernForCausalLM
from tern.transformers.settings import GenerateSettings, Streamer
from tern.transformers.tokenizer import BatchEncoding, TernTokenizer

__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "BatchEncoding",
    "GenerateSettings",
    "Streamer",
    "TernForCausalLM",
    "TernTokenizer",
]

_HARMLESS = {"trust_remote_code", "low_cpu_mem_usage", "use_fast", "attn_implementation", "use_safetensors"}
"""Keywords of `from_pretrained` that change nothing here: no code from a repository is ever run."""


class AutoTokenizer:
    """Opens a checkpoint's tokenizer as transformers' class of the same name does."""

    @staticmethod
    def from_pretrained(
        model: str | PathLike[str] | None,
        *,
        revision: str | None = None,
        token: str | None = None,
        padding_side: str = "left",
        **ignored: Any,
    ) -> TernTokenizer:
        """The tokenizer of a directory, a hub id, or None for the embedded model."""
        _refuse_unknown(ignored)
        if padding_side not in ("left", "right"):
            raise OptionError(f"padding_side is {padding_side!r}: it must be 'left' or 'right'.")
        source = resolve_model(model, revision=revision, token=token)
        return TernTokenizer(
            Tokenizer.from_directory(source.directory, source.text_files),
            ChatTemplate.from_directory(source.directory, source.text_files),
            padding_side=padding_side,
        )


class AutoModelForCausalLM:
    """Opens a checkpoint's network as transformers' class of the same name does."""

    @staticmethod
    def from_pretrained(
        model: str | PathLike[str] | None,
        *,
        device_map: str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        token: str | None = None,
        **ignored: Any,
    ) -> TernForCausalLM:
        """The network of a directory, a hub id, `dummy:PRESET`, or None for the embedded model.

        `dtype` (or its older name `torch_dtype`) is a torch dtype or its name; `device_map` is "auto" (a GPU where
        there is one, with the experts on the CPU if it is too small), "cpu", "cuda", "cuda:N", "split" or "split:N".
        """
        _refuse_unknown(ignored)
        wanted = dtype if dtype is not None else torch_dtype
        name = "auto" if wanted is None else str(wanted).removeprefix("torch.")
        options = EngineOptions.for_one_caller(dtype=name, device="auto" if device_map is None else device_map)
        source = resolve_model(model, revision=revision, token=token)
        engine = Engine.open(source, options)
        return TernForCausalLM(engine, source)


def _refuse_unknown(keywords: Mapping[str, Any]) -> None:
    unknown = sorted(keywords.keys() - _HARMLESS)
    if unknown:
        raise OptionError(f"from_pretrained got {', '.join(unknown)}, which Tern does not know: leave it out.")
