"""How much memory tensors take at their peak, counted as they are made and let go: on any device, without one."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryPeak(TorchDispatchMode):
    """`most`: the most bytes that tensors made by this thread inside the block held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {place for place, _ in map(_place, _tensors((args, kwargs)))}
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            place, size = _place(tensor)
            if place not in given and place not in self._counted:
                self._counted.add(place)
                self.held += size
                self.most = max(self.most, self.held)
                weakref.finalize(tensor.untyped_storage(), self._release, place, size)
        return made

    def _release(self, place: int, size: int) -> None:
        self._counted.discard(place)
        self.held -= size


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """What tells a tensor's memory from all other, and its bytes."""
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()
