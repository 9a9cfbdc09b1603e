"""The greedy choice of a step, made on the device so that the next step can begin with it before the host has read it.

Knows logits; knows no sequences. It chooses what `Sampler.sample` chooses for rows that are greedy and ask for nothing
else; `chosen_on_device` says which these are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tern import ops
from tern.engine.request import GeneratedToken
from tern.engine.sampler import NOT_FINITE
from tern.engine.sequence import Sequence


def chosen_on_device(sequence: Sequence) -> bool:
    """Whether the likeliest token is the sequence's next one, whatever its tokens so far: for all its steps to come."""
    state = sequence.sampling
    plain = state.greedy and state.grammar is None and state.params.logprobs is None
    return plain and not state.edits_logits(sequence.num_generated_tokens)


@dataclass(frozen=True)
class GreedyChoice:
    """The likeliest token of each row: `tokens` [rows] int64 on the device, and on its way to the host with its logit.

    `arrived` is reached when they are there; None where nothing is enqueued.
    """

    tokens: Tensor
    host_tokens: Tensor
    host_peaks: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, logits: Tensor) -> GreedyChoice:
        """Enqueue the choice for `logits` [rows, vocab] float32, and its copy to the host."""
        peaks, tokens = ops.largest(logits)
        tokens = tokens.clamp(0, logits.shape[1] - 1)  # a row of NaN has no place, and the embedding reads by it
        if logits.device.type != "cuda":
            return cls(tokens, tokens, peaks, None)
        host_tokens, host_peaks = (torch.empty_like(part, device="cpu", pin_memory=True) for part in (tokens, peaks))
        host_tokens.copy_(tokens, non_blocking=True)
        host_peaks.copy_(peaks, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return cls(tokens, host_tokens, host_peaks, arrived)

    def finish(self) -> list[GeneratedToken | str]:
        """Wait for the tokens: one a row, or the sentence that ends that row's request."""
        if self.arrived is not None:
            self.arrived.synchronize()
        pairs = zip(self.host_tokens.tolist(), self.host_peaks.tolist(), strict=True)
        return [GeneratedToken(token) if math.isfinite(peak) else NOT_FINITE for token, peak in pairs]
