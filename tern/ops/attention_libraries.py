"""Which library attends the chunks of prompts on a GPU: what is installed, what can, and which of them is chosen.

Imports a library only where one is to compute, so that a machine without a GPU never does. Knows names, types and
sizes; what a library is called with stands in `tern.ops.cuda.flash`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tern.errors import OptionError
from tern.ops.placement import uses_gpu

logger = logging.getLogger(__name__)


class AttentionLibrary(Protocol):
    """Attends chunks over caches as a GPU has them (`kv_cache_shapes`)."""

    @property
    def name(self) -> str:
        """As the option names it."""

    def attend(
        self,
        queries: Tensor,
        caches: tuple[Tensor, Tensor],
        chunks: Chunks,
        block_tables: Tensor,
        output: Tensor,
    ) -> None:
        """Write the rows `chunks.rows` of `output`; all tensors are the whole step's, the caches one layer's."""


@dataclass(frozen=True, eq=False)
class Chunks:
    """The sequences of one step that go to a library: all from the first chunk of a prompt to the last.

    They begin with sequence `first` and row `start` of the step; `lengths` and `contexts` [sequences] are on the host,
    int32. Decodes that stand between two chunks are among them, with a context of their one token, for Tern's kernels
    compute them; drafts too, which are computed twice.
    """

    library: AttentionLibrary
    first: int
    start: int
    lengths: npt.NDArray[np.int32]
    contexts: npt.NDArray[np.int32]

    @classmethod
    def of(
        cls, library: AttentionLibrary | None, query_starts: npt.NDArray[np.int64], context_lens: npt.NDArray[np.int64]
    ) -> Chunks | None:
        """Of a step with `query_starts` [S + 1] and `context_lens` [S]; None without a library or a chunk."""
        lengths = np.diff(query_starts)
        places = np.flatnonzero(lengths > 1)
        if library is None or not len(places):
            return None
        first, end = int(places[0]), int(places[-1]) + 1
        lengths = lengths[first:end].astype(np.int32)
        contexts = np.where(lengths > 1, context_lens[first:end], lengths).astype(np.int32)
        return cls(library, first, int(query_starts[first]), lengths, contexts)

    @property
    def sequences(self) -> slice:
        """Which of the step's sequences they are."""
        return slice(self.first, self.first + len(self.lengths))

    @property
    def rows(self) -> slice:
        """Which of the step's rows are theirs."""
        return slice(self.start, self.start + int(self.starts[-1]))

    @cached_property
    def starts(self) -> npt.NDArray[np.int32]:
        """Where each begins among `rows`, and where the last ends: [sequences + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)

    def longest_within(self, bound: int) -> int:
        """The most queries that a sequence of the step has, of those that have at most `bound`; at least 1."""
        return int(self.lengths[self.lengths <= bound].max(initial=1))

    def attend(self, queries: Tensor, caches: tuple[Tensor, Tensor], block_tables: Tensor, output: Tensor) -> None:
        """By the library; see `AttentionLibrary.attend`."""
        self.library.attend(queries, caches, self, block_tables, output)


@dataclass(frozen=True)
class AttentionWork:
    """What every layer of a network asks of attention; `dtype` is the queries', `block_size` a cache block's tokens."""

    device: torch.device
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    block_size: int


@dataclass(frozen=True)
class _Library:
    """`module` is what is imported, `package` what is installed, under which its version is known.

    `least` and `below` bound the compute capabilities that it is used on.
    """

    title: str
    module: str
    package: str
    least: tuple[int, int]
    below: tuple[int, int]
    head_dims: frozenset[int]


_LIBRARIES = {
    "flash-attn": _Library(
        "FlashAttention-3", "flash_attn_interface", "flash_attn_3", (9, 0), (10, 0), frozenset(range(8, 257, 8))
    ),
    "flashinfer": _Library("FlashInfer", "flashinfer", "flashinfer-python", (8, 0), (13, 0), frozenset((64, 128, 256))),
}
"""By the option's names for them, the one that "auto" prefers first."""


def installed_attention() -> dict[str, str]:
    """The libraries that are installed, by the option's names, with their versions; imports none of them."""
    return {name: _version(library) for name, library in _LIBRARIES.items() if find_spec(library.module) is not None}


def _version(library: _Library) -> str:
    try:
        return version(library.package)
    except PackageNotFoundError:
        return "of unknown version"


def check_attention_backend(name: str, device: torch.device) -> None:
    """Raise `OptionError` if the option names a library that is not installed, or a device that has no use for one."""
    if name not in _LIBRARIES:
        return
    if not uses_gpu(device):
        raise _refused(name, f"the device is {device}, and {_LIBRARIES[name].title} computes on a GPU")
    if name not in installed_attention():
        raise _refused(name, _absent(name))


def choose_attention(name: str, work: AttentionWork) -> AttentionLibrary | None:
    """The library that attends chunks of prompts, tried out; None where Tern's own kernels do.

    `name` is "tern", a library or "auto": that takes the first that is installed, can do the work and passes the trial.
    Raises `OptionError` with the reason if one that is asked for by name does not.
    """
    check_attention_backend(name, work.device)
    if name == "tern" or not uses_gpu(work.device):
        return None
    installed = installed_attention()
    for each in installed if name == "auto" else (name,):
        found = _open(each, work)
        if not isinstance(found, str):
            logger.info("attention: prompts by %s %s, decodes by Tern's kernels", each, installed[each])
            return found
        if name != "auto":
            raise _refused(each, found)
        logger.warning("%s %s is installed but not used: %s", each, installed[each], found)
    logger.info("attention: Tern's kernels")
    return None


def _open(name: str, work: AttentionWork) -> AttentionLibrary | str:
    """The library after its trial, or why it cannot be used."""
    problem = _unfit(_LIBRARIES[name], work)
    if problem is not None:
        return problem
    try:
        from tern.ops.cuda.flash import open_library

        return open_library(name, work)
    except torch.AcceleratorError as error:
        # This process computes nothing more, so nothing else can be tried in it.
        raise OptionError(
            f"{_LIBRARIES[name].title} broke the GPU's context when it was tried ({error}): "
            "start again with attention_backend tern, or without that package."
        ) from error
    except Exception as error:  # whatever an import, a compiler or a call in a package of others may raise
        return f"its trial failed ({type(error).__name__}: {error})"


def _unfit(library: _Library, work: AttentionWork) -> str | None:
    """Why a library cannot do the work, known without importing it."""
    title = library.title
    if work.dtype not in (torch.bfloat16, torch.float16):
        return f"{title} computes in bfloat16 or float16, not {_name(work.dtype)}"
    if work.cache_dtype != work.dtype:
        return f"{title} has no kernel for {_name(work.dtype)} over a cache of {_name(work.cache_dtype)}"
    if work.head_dim not in library.head_dims:
        return f"{title} has no kernel for heads of {work.head_dim}"
    capability = _capability(work.device)
    if capability is not None and not library.least <= capability < library.below:
        return f"{title} is not used on compute capability {capability[0]}.{capability[1]}"
    return None


def _capability(device: torch.device) -> tuple[int, int] | None:
    """The card's compute capability; None where kernels are interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _absent(name: str) -> str:
    library = _LIBRARIES[name]
    problem = f"{library.title} is not installed: there is no module {library.module}"
    if name == "flash-attn":
        problem += " (a package flash-attn has FlashAttention-2, which reads no blocks of 16 tokens)"
    return problem


def _refused(name: str, problem: str) -> OptionError:
    return OptionError(f"attention_backend is {name!r}, but {problem}: see docs/gpu.md, or choose auto or tern.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
