"""What of a model fits on a device, from its description alone. Knows sizes; loads and allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tern.checkpoint import QUANTIZATIONS, ModelSource, weight_bytes
from tern.checkpoint.quantisation import check_quantization, choose_quantization
from tern.engine.cache_size import MOST_MEMORY_SHARE, free_memory, token_bytes
from tern.engine.options import EngineOptions
from tern.errors import OptionError

FLOATS = "bfloat16"
RUNNING_BYTES = 1_500_000_000
"""Memory that Python, torch and a step's activations take beside weights and cache, about."""


@dataclass(frozen=True)
class Fit:
    """One precision of a model on one device: sizes in 10^9 bytes, and the longest context in tokens, prompt and answer
    together, that the default cache holds; 0 if the weights do not fit.
    """

    device: str
    precision: str
    weights_gb: float
    kv_gb_per_1000_tokens: float
    longest_context: int
    fits: bool


def stored_precision(source: ModelSource) -> str | None:
    """The precision in which the files are packed already, or None if they are floats or of another engine's kind."""
    return None if source.stored_bits is None else f"wint{source.stored_bits}"


def fits_of(source: ModelSource, device: torch.device, free: int) -> list[Fit]:
    """What of `source` fits in `free` bytes of the device, the most precise first."""
    stored = stored_precision(source)
    precisions = [stored] if stored else [None, *reversed(QUANTIZATIONS)]
    return [_fit(source, wanted, device, free) for wanted in precisions if _runs(wanted, device)]


def check_fits(source: ModelSource, options: EngineOptions, device: torch.device) -> None:
    """Raise `OptionError`, before anything is read, if the weights as floats are larger than what a GPU has free.

    On the processor they are mapped, and packed weights are small: what does not fit shows when they are loaded.
    """
    if device.type != "cuda" or stored_precision(source) is not None:
        return
    if choose_quantization(options.quantization, source.default_quantization, device) is None:
        dtype = torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype)
        if weight_bytes(source.config, dtype, None) > free_memory(device):
            raise does_not_fit(source, device)


def does_not_fit(source: ModelSource, device: torch.device) -> OptionError:
    """The error for a model that is too large for a GPU: it says what would fit, there and on the processor."""
    free, cpu = free_memory(device), torch.device("cpu")
    fits = [*fits_of(source, device, free), *fits_of(source, cpu, free_memory(cpu))]
    good = [
        f"{fit.device} in {fit.precision} ({fit.weights_gb:.1f} GB), max_model_len up to {fit.longest_context}"
        for fit in fits
        if fit.fits
    ]
    precision = stored_precision(source)
    needed = weight_bytes(source.config, torch.bfloat16, precision) / 1e9
    advice = f"What fits: {'; '.join(good)}." if good else "Nothing here has memory enough: use a smaller model."
    return OptionError(
        f"{source.name} does not fit on {device}: its weights are {needed:.1f} GB in {precision or FLOATS}, cache and "
        f"steps come on top, and {free / 1e9:.1f} GB are free. {advice}"
    )


def _runs(quantization: str | None, device: torch.device) -> bool:
    """Whether weights of this precision run on the device."""
    if quantization is None:
        return True
    try:
        check_quantization(quantization, device)
    except OptionError:
        return False
    return True


def _fit(source: ModelSource, quantization: str | None, device: torch.device, free: int) -> Fit:
    weights = weight_bytes(source.config, torch.bfloat16, quantization)
    per_token = token_bytes(source.config, torch.bfloat16)
    left = free - weights
    room = max(0, min(left - RUNNING_BYTES, int(left * MOST_MEMORY_SHARE)))
    longest = min(source.config.max_position_embeddings, room // per_token)
    return Fit(str(device), quantization or FLOATS, weights / 1e9, per_token / 1e6, longest, longest > 0)
