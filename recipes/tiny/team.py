"""Several processes that train one model together, each on its own data.

One single-threaded process per core beats one process with a thread per core: they wait for each other once a step,
not at every matrix product. Start them with ``torchrun --nproc-per-node 2 -m recipes.tiny.train``; without torchrun
there is a team of one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Team:
    """This process's number among `size`."""

    rank: int = 0
    size: int = 1

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the team."""
        if self.size == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def wait(self) -> None:
        """Until every process of the team is here."""
        if self.size > 1:
            dist.barrier()


def join_team() -> Team:
    """The team that torchrun started this process in."""
    if "RANK" not in os.environ:
        return Team()
    dist.init_process_group("gloo")
    return Team(dist.get_rank(), dist.get_world_size())
