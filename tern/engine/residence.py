"""Whether a network lies whole on a GPU, split between GPU and CPU, or on the CPU. Knows bytes and what is free."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from tern.checkpoint import ModelSource
from tern.engine.fits import CPU, CacheNeed, Room, WeightSizes, does_not_fit, dtype_of, gigabytes
from tern.engine.options import EngineOptions
from tern.errors import OptionError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChosenResidence:
    """`kind`: "cuda", "split" or "cpu"; `split`: how the experts are packed if it is split; `reason`: one sentence."""

    kind: str
    split: str | None
    reason: str


def choose_residence(sizes: WeightSizes, need: CacheNeed, gpu: Room, host: Room) -> ChosenResidence:
    """Where the weights go: whole on the GPU if they fit there beside the cache, else split, else on the CPU.

    A shorter sequence than asked for would fit sooner, but that is not chosen unasked. Raises `OptionError`, with the
    sizes, if nothing fits.
    """
    takes = f"The weights take {gigabytes(sizes.on_gpu)} and the cache of {need.tokens} tokens {gigabytes(need.size)}"
    room = f"the {gigabytes(gpu.for_weights)} that the GPU has for both"
    if gpu.for_cache(sizes.on_gpu) >= need.size:
        return ChosenResidence("cuda", None, f"{takes} of {room}.")
    hint = _hint(sizes, need, gpu, host)
    for packing, (beside, experts) in sizes.split.items():
        if gpu.for_cache(beside) >= need.size and experts <= host.for_weights:
            return ChosenResidence(
                "split",
                packing,
                f"{takes}, more than {room}: {gigabytes(beside)} of the weights lie there and the routed experts in "
                f"the host's memory, {gigabytes(experts)} as {packing}.{hint}",
            )
    if sizes.on_cpu is not None and host.for_cache(sizes.on_cpu) >= need.size:
        return ChosenResidence(
            "cpu", None, f"{takes}, more than {room}, but fit into the host's memory: they lie there.{hint}"
        )
    raise OptionError(
        f"{takes}, more than {room}, and the host has {gigabytes(host.for_weights)} for them: choose a quantization of "
        f"fewer bits, such as wint4, or a smaller max_model_len, or free memory.{hint}"
    )


def _hint(sizes: WeightSizes, need: CacheNeed, gpu: Room, host: Room) -> str:
    """What a shorter sequence would allow, as a sentence, or nothing."""
    whole = need.longest(gpu.for_cache(sizes.on_gpu))
    if whole:
        return f" With max_model_len up to {whole} they would lie there whole."
    for beside, experts in sizes.split.values():
        split = need.longest(gpu.for_cache(beside))
        if experts <= host.for_weights and 0 < split < need.tokens:
            return f" With max_model_len up to {split} only the routed experts would lie in the host's memory."
    return ""


def choose_packing(sizes: WeightSizes, host: Room) -> str:
    """How the routed experts are packed where the option `device` asks for a split: the most precisely that fits."""
    if not sizes.split:
        raise OptionError(
            "device is 'split', but there are no routed experts that could be packed on the CPU "
            "(a dense network, or quantization 'none'): choose device cuda or cpu, or another quantization."
        )
    for packing, (_, experts) in sizes.split.items():
        if experts <= host.for_weights:
            return packing
    packing, (_, experts) = list(sizes.split.items())[-1]
    raise OptionError(
        f"device is 'split', but the routed experts take {gigabytes(experts)} as {packing} and the host has "
        f"{gigabytes(host.for_weights)} for them: choose quantization wint4, or free memory."
    )


def resolve_residence(
    options: EngineOptions, source: ModelSource, device: torch.device
) -> tuple[torch.device, str | None]:
    """The network's device, and how its routed experts are packed where those stay on the CPU.

    `device` is the one that the options name, a GPU's for "split", and for "auto" where there is one. Raises
    `OptionError`, before anything is read, if that is a GPU on which weights, steps and cache do not fit. On the
    processor floats are mapped, and what does not fit shows when it is loaded.
    """
    if device.type == "cpu":
        return device, None
    dtype = dtype_of(source, options)
    sizes, need = WeightSizes.of(source, dtype, options.quantization), CacheNeed.of(source, options, dtype)
    gpu, host = Room.of(device, options, source.config), Room.of(CPU, options, source.config)
    if options.device == "auto":
        chosen = choose_residence(sizes, need, gpu, host)
        logger.info("%s", chosen.reason)
        return (CPU if chosen.kind == "cpu" else device), chosen.split
    split = choose_packing(sizes, host) if options.device.startswith("split") else None
    if gpu.for_cache(sizes.on_gpu if split is None else sizes.split[split][0]) < need.size:
        raise does_not_fit(source, options, dtype, device, split)
    return device, split
