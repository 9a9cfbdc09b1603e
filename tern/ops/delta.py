"""What a part of a layer has still to add to the residual stream: rows, or what they are the sum of.

Knows the order of that sum; knows no experts' arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ExpertOutputs:
    """What a mixture of experts comes to before it is summed, so that the norm that reads the sum can make it.

    `outputs` [T * K, H] of the pairs t * K + k of a token and an expert, `weights` [T, K] float32, `experts` [T, K],
    `shared` [T, H] or None.
    """

    outputs: Tensor
    weights: Tensor
    experts: Tensor
    shared: Tensor | None

    def sum(self) -> Tensor:
        """The rows [T, H]: a token's weighted outputs are added in float32, in the order of the experts' numbers.

        Rounded to the type of `outputs` are that sum, and the sum of it and the shared row.
        """
        tokens, experts_per_token = self.experts.shape
        order = self.experts.argsort(dim=1, stable=True)
        pairs = order + torch.arange(0, tokens * experts_per_token, experts_per_token, device=order.device)[:, None]
        factors = self.weights.gather(1, order)
        total = self.outputs.new_zeros(tokens, self.outputs.shape[1], dtype=torch.float32)
        for place in range(experts_per_token):
            total += self.outputs[pairs[:, place]].float() * factors[:, place, None]
        routed = total.to(self.outputs.dtype)
        return routed if self.shared is None else routed + self.shared


Delta = Tensor | ExpertOutputs
"""Rows [T, H] that the next norm adds to the residual stream."""
