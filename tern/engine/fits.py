"""What of a model fits on a device, from its description alone. Knows sizes; loads and allocates nothing."""

from __future__ import annotations

import torch

from tern.checkpoint import QUANTIZATIONS, ModelSource, weight_bytes
from tern.checkpoint.quantisation import check_quantization, choose_quantization
from tern.engine.cache_size import MOST_MEMORY_SHARE, free_memory, token_bytes
from tern.engine.options import EngineOptions
from tern.errors import OptionError
from tern.model.config import ErnieConfig

FLOATS = "bfloat16"
RUNNING_BYTES = 1_500_000_000
"""Memory that Python, torch and a step's activations take beside weights and cache, about."""


def longest_context(config: ErnieConfig, weights: int, free: int) -> int:
    """The longest sequence, in tokens, that the default cache holds beside `weights` in `free` bytes; 0: none."""
    left = free - weights
    room = max(0, min(left - RUNNING_BYTES, int(left * MOST_MEMORY_SHARE)))
    return min(config.max_position_embeddings, room // token_bytes(config, torch.bfloat16))


def runs_on(quantization: str | None, device: torch.device) -> bool:
    """Whether weights of this precision run on the device; None is floats."""
    if quantization is None:
        return True
    try:
        check_quantization(quantization, device)
    except OptionError:
        return False
    return True


def check_fits(source: ModelSource, options: EngineOptions, device: torch.device) -> None:
    """Raise `OptionError`, before anything is read, if the weights as floats are larger than what a GPU has free.

    On the processor they are mapped, and packed weights are small: what does not fit shows when they are loaded.
    """
    if device.type != "cuda" or source.stored_bits is not None:
        return
    if choose_quantization(options.quantization, source.default_quantization, device) is None:
        dtype = torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype)
        if weight_bytes(source.config, dtype, None, gpu=True) > free_memory(device):
            raise does_not_fit(source, device)


def does_not_fit(source: ModelSource, device: torch.device) -> OptionError:
    """The error for a model that is too large for a GPU: it says what would fit, there and on the processor."""
    stored = None if source.stored_bits is None else f"wint{source.stored_bits}"
    fitting = []
    for each in (device, torch.device("cpu")):
        for precision in [stored] if stored else [None, "fp8", *reversed(QUANTIZATIONS)]:
            weights = weight_bytes(source.config, torch.bfloat16, precision, gpu=each.type == "cuda")
            longest = longest_context(source.config, weights, free_memory(each))
            if longest and runs_on(precision, each):
                size = f"{weights / 1e9:.1f} GB"
                fitting.append(f"{each} in {precision or FLOATS} ({size}), max_model_len up to {longest}")
    needed = weight_bytes(source.config, torch.bfloat16, stored, gpu=device.type == "cuda") / 1e9
    advice = f"What fits: {'; '.join(fitting)}." if fitting else "Nothing here has memory enough: use a smaller model."
    return OptionError(
        f"{source.name} does not fit on {device}: its weights are {needed:.1f} GB in {stored or FLOATS}, cache and "
        f"steps come on top, and {free_memory(device) / 1e9:.1f} GB are free. {advice}"
    )
