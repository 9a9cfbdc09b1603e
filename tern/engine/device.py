"""Which device an engine runs on, what that device is, and which errors mean that it ran out of memory or is gone.

Knows torch's view of devices; knows no model and no cache.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from tern.errors import OptionError

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 0)
"""Compute capability from which on there is bfloat16."""
FP8_CAPABILITY = (8, 9)
"""Compute capability from which on there are products of fp8."""
CONTEXT_BYTES = 1_000_000_000
"""What a process takes of a GPU before it has stored anything there, and a little more."""


@dataclass(frozen=True)
class GpuFacts:
    """A card as torch sees it: compute capability (major, minor), memory in bytes, what of it is free now."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int

    @classmethod
    def of(cls, device: torch.device) -> GpuFacts:
        """Ask torch. The first question of a process starts its context on the card, which takes memory too."""
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        return cls(properties.name, (properties.major, properties.minor), int(total), int(free))

    @property
    def taken(self) -> int:
        """Bytes that are not free beyond what any process needs: before the weights are loaded, other processes'."""
        return max(0, self.total - self.free - CONTEXT_BYTES)


def resolve_device(name: str, *, fp8: bool = False) -> torch.device:
    """The device that an option names; "auto" is the first GPU if it can be used, else the
    processor; "split" is a GPU too.

    `fp8`: weights or cache are to be kept in it. Raises `OptionError` that says what is missing: a torch that was
    built for GPUs, a driver, the card of that number, or a newer card.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name != "auto":
        _check_present(name)
    device = torch.device("cuda", 0 if name == "auto" else _number(name))
    facts = GpuFacts.of(device)
    problem = unfit(facts, fp8=fp8)
    if problem is None:
        if facts.taken > 0:
            logger.warning("other processes hold %.1f GB of %s (%s)", facts.taken / 1e9, device, facts.name)
        return device
    if name == "auto" and not fp8:
        logger.warning("%s So this runs on the processor.", problem)
        return torch.device("cpu")
    raise OptionError(problem)


def _number(name: str) -> int:
    """Which card "cuda:N" or "split:N" means; the first without a number."""
    return int(name.partition(":")[2] or 0)


def _check_present(name: str) -> None:
    """Raise `OptionError` unless there is a GPU of that name."""
    if torch.version.cuda is None:
        raise OptionError(
            f"device is {name!r}, but this torch ({torch.__version__}) was built without CUDA: install the build of "
            "torch for CUDA and pip install 'tern-llm[gpu]', or choose cpu or auto."
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"
    if not torch.cuda.is_available():
        if visible is not None and visible.strip() in ("", "-1"):
            raise OptionError(
                f"device is {name!r}, but CUDA_VISIBLE_DEVICES is {visible!r}, which hides every card: unset it, or "
                "choose cpu or auto."
            )
        raise OptionError(
            f"device is {name!r}, and this torch has CUDA {torch.version.cuda}, but no NVIDIA GPU can be used "
            f"({_why_not()}{chosen}): install or update NVIDIA's driver, or choose cpu or auto."
        )
    count, number = torch.cuda.device_count(), _number(name)
    if number >= count:
        kind = name.partition(":")[0]
        numbers = f"{kind}:0" if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
        raise OptionError(
            f"device is {name!r}, but there {'is 1 GPU' if count == 1 else f'are {count} GPUs'} here{chosen}: "
            f"choose {numbers}."
        )


def _why_not() -> str:
    """What torch says about the driver or the cards, its first sentence."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:
        return str(error).split(". ")[0].rstrip(".")
    return "torch names no reason"


def unfit(facts: GpuFacts, *, fp8: bool) -> str | None:
    """Why the card cannot be used, as a sentence, or None."""
    has = f"{facts.name} has compute capability {facts.capability[0]}.{facts.capability[1]}"
    if facts.capability < LEAST_CAPABILITY:
        return f"{has}, and Tern's kernels need 8.0 or newer (bfloat16): choose another GPU, or cpu."
    if fp8 and facts.capability < FP8_CAPABILITY:
        return f"{has}, and fp8 needs 8.9 or newer: choose another precision, or another GPU."
    return None


def current(device: torch.device) -> AbstractContextManager[None]:
    """Make `device` the one on which this thread launches kernels, inside the block."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def free_unused_memory(device: torch.device) -> None:
    """Give back what torch's allocator keeps without need, so that pieces of it do not stand in the way."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: for torch's allocator on the processor that is a `RuntimeError` like any other."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in said or (_is_of_cuda(error) and "out of memory" in said)
    )


def is_device_lost(error: BaseException) -> bool:
    """Whether the GPU computes nothing more for this process: after an error of CUDA, each later call fails too."""
    return _is_of_cuda(error) and not is_out_of_memory(error)


def _is_of_cuda(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return False
    said = str(error)
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and ("CUDA error" in said or "Triton Error [CUDA]" in said)
    )
