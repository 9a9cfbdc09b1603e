"""Requests to tokens: scheduler, KV cache, sampler and the step loop. Knows no HTTP, no text and no ERNIE.

The names are imported when first used, so that the scheduler and the request types come without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tern.engine.engine import Engine
    from tern.engine.options import EngineOptions
    from tern.engine.request import (
        CONTINUE,
        Finish,
        FinishReason,
        GeneratedToken,
        Milestones,
        PromptSink,
        Request,
        ScoredToken,
        Steering,
        TokenGrammar,
        TokenLogprob,
        TokenSink,
    )
    from tern.engine.sampling_params import SamplingParams
    from tern.engine.service import EngineService, ServiceState
    from tern.engine.stats import EngineFacts, EngineStats, PromptProgress
    from tern.engine.structured_outputs import StructuredOutputsParams

__all__ = [
    "CONTINUE",
    "Engine",
    "EngineFacts",
    "EngineOptions",
    "EngineService",
    "EngineStats",
    "Finish",
    "FinishReason",
    "GeneratedToken",
    "Milestones",
    "PromptProgress",
    "PromptSink",
    "Request",
    "SamplingParams",
    "ScoredToken",
    "ServiceState",
    "Steering",
    "StructuredOutputsParams",
    "TokenGrammar",
    "TokenLogprob",
    "TokenSink",
]

_HOMES = {
    "Engine": "engine",
    "EngineFacts": "stats",
    "EngineStats": "stats",
    "EngineOptions": "options",
    "PromptProgress": "stats",
    "SamplingParams": "sampling_params",
    "EngineService": "service",
    "ServiceState": "service",
    "StructuredOutputsParams": "structured_outputs",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'request')}"), name)


def __dir__() -> list[str]:
    return __all__
