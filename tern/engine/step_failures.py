"""What becomes of a step that fails: whom it takes with it, and what they are told. Knows chunks; runs no model."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field

import torch

from tern.engine.device import is_out_of_memory
from tern.engine.runner import StepResult
from tern.engine.scheduler import Chunk
from tern.engine.sequence import Sequence, SequenceStatus

STEP_FAILED = "The engine failed while computing this request; its log says why. Other requests go on: try again."
OUT_OF_MEMORY = (
    "There was not enough memory to compute this request: send a shorter one, or try again with fewer others."
)

GPU_OUT_OF_MEMORY = (
    "There was not enough memory on the GPU to compute this request: send a shorter one, or try again with fewer "
    "others; whoever runs Tern can lower --gpu-memory-utilization, so that the cache takes less of it, or "
    "--max-num-batched-tokens, so that a step does."
)
DEVICE_LOST = "The GPU failed and computes nothing more for this process; the engine's log says why. Start it again."


@dataclass(frozen=True)
class Computed:
    """Chunks that were computed in one go, and what they gave."""

    chunks: Ordered[Chunk]
    result: StepResult


@dataclass
class Outcome:
    """What of a step was computed, and the sequences that could not be, each with the sentence that says so.

    `repeated`: the chunks failed together.
    """

    computed: list[Computed] = field(default_factory=list)
    failed: list[tuple[Sequence, str]] = field(default_factory=list)
    repeated: bool = False


def compute_what_can_be(chunks: Ordered[Chunk], attempt: Callable[[Ordered[Chunk]], StepResult | str]) -> Outcome:
    """Compute the chunks together or, if that fails, once more, each alone; `attempt` gives a sentence if it fails.

    What a step writes it can write again, and what it draws depends on nothing but the sequence. So a request that
    cannot be computed takes no other with it. Sequences that ended while the step was in flight are not computed again.
    """
    whole = attempt(chunks)
    if not isinstance(whole, str):
        return Outcome([Computed(chunks, whole)])
    if len(chunks) == 1:
        return Outcome(failed=[(chunks[0].sequence, whole)])
    outcome = Outcome(repeated=True)
    for chunk in chunks:
        if chunk.sequence.status is SequenceStatus.FINISHED:
            continue
        alone = attempt([chunk])
        if isinstance(alone, str):
            outcome.failed.append((chunk.sequence, alone))
        else:
            outcome.computed.append(Computed([chunk], alone))
    return outcome


def explain(error: Exception, device: torch.device) -> str:
    """The sentence for a request that could not be computed."""
    if not is_out_of_memory(error):
        return STEP_FAILED
    return GPU_OUT_OF_MEMORY if device.type == "cuda" else OUT_OF_MEMORY
