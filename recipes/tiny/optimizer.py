"""Muon for the matrices, AdamW for everything else, and the learning-rate schedule.

Muon replaces a matrix's momentum by the nearest orthogonal matrix, which on small models learns more from every token
than Adam does. A stack of matrices [E, rows, columns] is orthogonalised matrix by matrix.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from recipes.tiny.team import Team

MATRIX_RATE = 0.01
MATRIX_DECAY = 0.2
"""Weight decay of the matrices. Without it they outgrow the updates, whose size is fixed, and learning stalls."""
OTHER_RATE = 0.003
WARMUP_SHARE = 0.02
DECAY_SHARE = 0.7
"""The last part of the run, in which the rate falls to zero."""


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Newton-Schulz iteration towards U V^T of `matrix` = U S V^T: [..., rows, columns], in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(torch.bfloat16)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; the step's size follows the matrix's shape. A team shares the orthogonalising."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, team: Team, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.team = team

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            updates = [self.update(p, index, group["momentum"]) for index, p in enumerate(group["params"])]
            self.team.add_up(updates)
            for parameter, update in zip(group["params"], updates, strict=True):
                scale = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
                parameter.mul_(1 - group["lr"] * MATRIX_DECAY).add_(update, alpha=-group["lr"] * scale)

    def update(self, parameter: nn.Parameter, index: int, factor: float) -> Tensor:
        """The direction for one matrix; zeros if it is another process's to orthogonalise."""
        gradient = parameter.grad
        if gradient is None:
            raise ValueError("every matrix needs a gradient")
        state = self.state[parameter]
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        momentum.lerp_(gradient, 1 - factor)
        if index % self.team.size != self.team.rank:
            return torch.zeros_like(parameter)
        return orthogonalise(gradient.lerp(momentum, factor)).to(parameter.dtype)


def build(model: nn.Module, team: Team) -> list[torch.optim.Optimizer]:
    """The two optimisers; embedding, norms and router weights go to AdamW."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() > 1 and "embed" not in name and not name.endswith("gate.weight")
        (matrices if is_matrix else others).append(parameter)
    return [
        Muon(matrices, MATRIX_RATE, team),
        torch.optim.AdamW(others, OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def rate(step: int, steps: int) -> float:
    """The share of the full learning rate at `step` of `steps`: warm-up, plateau, then a fall to zero."""
    warm = min(1.0, (step + 1) / (WARMUP_SHARE * steps))
    left = (steps - step) / (DECAY_SHARE * steps)
    return min(warm, left, 1.0)
