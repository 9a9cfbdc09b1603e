"""Whether a network lies whole on a GPU, split between GPU and CPU, or on the CPU. Knows bytes and what is free."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tern.checkpoint import FP8_QUANTIZATIONS, QUANTIZATIONS, ModelSource, split_bytes, weight_bytes
from tern.engine.cache_size import free_memory
from tern.engine.fits import RUNNING_BYTES
from tern.engine.options import EngineOptions
from tern.errors import OptionError

logger = logging.getLogger(__name__)

_FLOATS = "none"


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a network's weights, whole `on_gpu` and whole `on_cpu` (None where they do not run there).

    `split`: by packing of the routed experts, the most precise first, the bytes on the GPU and on the CPU; empty for a
    network without routed experts.
    """

    on_gpu: int
    on_cpu: int | None
    split: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, source: ModelSource, dtype: torch.dtype, quantization: str | None) -> WeightSizes:
        """The sizes of a model that is loaded in `dtype` with the option `quantization`."""
        config = source.config
        stored = None if source.stored_bits is None else f"wint{source.stored_bits}"
        rounded = stored or quantization or source.default_quantization
        packings: tuple[str, ...] = ("wint8", "wint4")
        if rounded in QUANTIZATIONS:
            packings = (rounded,)
        elif rounded in FP8_QUANTIZATIONS:
            packings = ("wint8",)
        elif rounded == _FLOATS:
            packings, rounded = (), None
        has_experts = any(map(config.is_moe_layer, range(config.num_hidden_layers)))
        return cls(
            weight_bytes(config, dtype, rounded, gpu=True),
            None if rounded in FP8_QUANTIZATIONS else weight_bytes(config, dtype, rounded),
            {each: split_bytes(config, dtype, rounded, each) for each in packings} if has_experts else {},
        )


@dataclass(frozen=True)
class ChosenResidence:
    """`kind`: "cuda", "split" or "cpu"; `split`: how the experts are packed if it is split; `reason`: one sentence."""

    kind: str
    split: str | None
    reason: str


def choose_residence(sizes: WeightSizes, free_gpu: int, free_host: int) -> ChosenResidence:
    """Where the weights go: whole on the GPU if they fit there, else split, else on the CPU.

    `free_gpu` and `free_host` are the bytes that may be used. Raises `OptionError`, with the sizes, if nothing fits.
    """
    gpu, host = free_gpu - RUNNING_BYTES, free_host - RUNNING_BYTES
    needed, room = _gigabytes(sizes.on_gpu), f"the {_gigabytes(max(0, gpu))} that the GPU has for weights"
    if sizes.on_gpu <= gpu:
        return ChosenResidence("cuda", None, f"The weights take {needed} of {room}.")
    for packing, (beside, experts) in sizes.split.items():
        if beside <= gpu and experts <= host:
            return ChosenResidence(
                "split",
                packing,
                f"The weights take {needed}, more than {room}: {_gigabytes(beside)} of them lie there and the routed "
                f"experts in the host's memory, {_gigabytes(experts)} as {packing}.",
            )
    if sizes.on_cpu is not None and sizes.on_cpu <= host:
        return ChosenResidence(
            "cpu",
            None,
            f"The weights take {needed}, more than {room}, but fit into the host's memory: they lie there.",
        )
    raise OptionError(
        f"The weights take {needed}, more than {room}, and the host has {_gigabytes(max(0, host))} for them: "
        "choose a quantization of fewer bits, such as wint4, or free memory."
    )


def choose_packing(sizes: WeightSizes, free_host: int) -> str:
    """How the routed experts are packed where the option `device` asks for a split: the most precisely that fits."""
    if not sizes.split:
        raise OptionError(
            "device is 'split', but there are no routed experts that could be packed on the CPU "
            "(a dense network, or quantization 'none'): choose device cuda or cpu, or another quantization."
        )
    host = free_host - RUNNING_BYTES
    for packing, (_, experts) in sizes.split.items():
        if experts <= host:
            return packing
    packing, (_, experts) = list(sizes.split.items())[-1]
    raise OptionError(
        f"device is 'split', but the routed experts take {_gigabytes(experts)} as {packing} and the host has "
        f"{_gigabytes(max(0, host))} for them: choose quantization wint4, or free memory."
    )


def resolve_residence(
    options: EngineOptions, source: ModelSource, dtype: torch.dtype | None, device: torch.device
) -> tuple[torch.device, str | None]:
    """The network's device, and how its routed experts are packed where those stay on the CPU.

    `device` is the one that the options name, a GPU's for "split", and for "auto" where there is one.
    """
    split = options.device.startswith("split")
    if device.type == "cpu" or not (split or options.device == "auto"):
        return device, None
    declared = torch.bfloat16 if source.config.dtype is None else getattr(torch, source.config.dtype)
    sizes = WeightSizes.of(source, dtype or declared, options.quantization)
    free_host = free_memory(torch.device("cpu"))
    if split:
        return device, choose_packing(sizes, free_host)
    chosen = choose_residence(sizes, free_memory(device), free_host)
    logger.info("%s", chosen.reason)
    return (torch.device("cpu") if chosen.kind == "cpu" else device), chosen.split


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
