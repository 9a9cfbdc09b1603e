"""Tern runs Baidu's ERNIE-4.5-21B-A3B-Thinking and its family. The public names, loaded when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tern.engine.sampling_params import SamplingParams
    from tern.engine.structured_outputs import StructuredOutputsParams
    from tern.errors import TernError
    from tern.llm import LLM, CompletionOutput, Logprob, RequestOutput

__version__ = "0.1.0"

_HOMES = {
    "LLM": "tern.llm",
    "CompletionOutput": "tern.llm",
    "Logprob": "tern.llm",
    "RequestOutput": "tern.llm",
    "SamplingParams": "tern.engine.sampling_params",
    "StructuredOutputsParams": "tern.engine.structured_outputs",
    "TernError": "tern.errors",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TernError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tern' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
