"""What the sampler asks of a device: the tokens of the CPU, one read a step, and none before `finish`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_sampler import Row, make_row
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tern
from tern.engine.sampler import ALL_MASKED, GRAMMAR_FAILED, NOT_FINITE, Sampler
from tern.ops.placement import interpreted

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
import tern.ops.cuda  # it must import triton before torch does so for the modes below

ON_GPU = torch.cuda.is_available()
VOCAB = 1000
READS = {Tensor.tolist, Tensor.cpu}
AWAITED = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "unique_dim", "equal"}
HERE = str(Path(tern.__file__).parent)


def reader() -> str | None:
    """The place in Tern that reads a tensor now; None if the interpreter of its kernels does."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if f"{Path('site-packages', 'triton')}" in name:
            return None
        if name.startswith(HERE):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


class Reads(TorchFunctionMode):
    """Keeps the places that read values of tensors into the host's program."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and (place := reader()):
            self.places.append(place)
        return func(*args, **(kwargs or {}))


class Awaited(TorchDispatchMode):
    """Keeps the places of operations whose result the host must know: item(), a truth, the size of a selection."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in AWAITED and (place := reader()):
            self.places.append(place)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """The places at which a device would have had to answer."""
    reads, awaited = Reads(), Awaited()
    places: list[str] = []
    with reads, awaited:
        yield places
    places += reads.places + awaited.places


class Allowing:
    """A grammar that allows some tokens, or fails."""

    ended = False

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens

    def fill(self, mask: np.ndarray, ahead: Any) -> bool:
        assert len(ahead) == 0
        if not self.tokens:
            raise RuntimeError("a grammar that fails")
        for token in self.tokens:
            mask[token // 32] |= np.uint32(1 << token % 32)
        return True


def held(row: Row, grammar: Allowing) -> Row:
    row.sampling.grammar = grammar  # type: ignore[assignment]
    row.ahead = ()  # type: ignore[attr-defined]
    return row


def every_kind() -> list[Row]:
    return [
        make_row(temperature=0.0),
        make_row(seed=1),
        make_row(seed=2, temperature=0.7, top_p=0.9),
        make_row(seed=3, top_k=5, min_p=0.01),
        make_row((1, 2, 3), (5, 5, 6), temperature=0.0, repetition_penalty=1.5, logit_bias={7: 9.0, 8: -3.0}),
        make_row((1, 2), (5, 5, 6), seed=4, presence_penalty=0.5, frequency_penalty=0.5, top_p=0.8),
        make_row(seed=5, allowed_token_ids=[3, 999, 40]),
        make_row(seed=6, min_tokens=3, stop_ids=frozenset({2}), bad=((4,), (5, 6))),
        held(make_row(seed=7), Allowing(11, 640, 998)),
        held(make_row(temperature=0.0), Allowing()),
        make_row(temperature=0.0, allowed_token_ids=[4], bad=((4,),)),
        make_row(seed=8, top_p=0.5),
    ]


def logits_of(rows: int) -> Tensor:
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    logits[rows - 1, 3] = float("nan")
    return logits


def begin(logits: Tensor, rows: list[Row]) -> Any:
    return Sampler().begin(logits, rows)  # type: ignore[arg-type]


def test_the_counting_of_reads_would_notice_one() -> None:
    from tern.engine.sampler import score

    with host_reads() as places:
        score(logits_of(2)[:1], [1], [0])
    assert len(places) > 1


@pytest.mark.parametrize("kinds", [slice(None), slice(1), slice(1, 2), slice(4, 5)], ids=str)
def test_a_step_is_read_once_and_gives_the_tokens_of_the_cpu(kinds: slice) -> None:
    rows = every_kind()[kinds]
    logits = logits_of(12)[kinds]
    expected = begin(logits.clone(), rows).finish()
    device = torch.device("cuda" if ON_GPU else "cpu")
    with interpreted():
        with host_reads() as before:
            choice = begin(logits.to(device, copy=True), rows)
        with host_reads() as after:
            answers = choice.finish()
    assert before == []
    assert len(after) == 1
    assert answers == expected
    assert choice.tokens.shape == (len(rows),)
    assert all(0 <= token < VOCAB for token in choice.tokens.tolist())


def test_the_plain_kernels_are_read_once_too() -> None:
    """On the CPU, where kernels take what the host knows of the draws from tensors, a greedy step reads its tokens."""
    rows = [make_row(temperature=0.0), make_row(temperature=0.0, logit_bias={3: 4.0})]
    with host_reads() as places:
        begin(logits_of(3)[:2], rows).finish()
    assert len(places) == 1


def test_each_failure_has_its_sentence() -> None:
    answers = begin(logits_of(12), every_kind()).finish()
    assert [answers[place] for place in (9, 10, 11)] == [GRAMMAR_FAILED, ALL_MASKED, NOT_FINITE]
    assert not any(isinstance(answer, str) for answer in answers[:9])


def test_a_step_is_finished_after_the_next_has_begun() -> None:
    rows = every_kind()
    logits, others = logits_of(12), torch.randn(12, VOCAB, generator=torch.Generator().manual_seed(1))
    alone = [begin(logits.clone(), rows).finish(), begin(others.clone(), rows).finish()]
    first = begin(logits.clone(), rows)
    second = begin(others.clone(), rows)
    assert [first.finish(), second.finish()] == alone
    assert first.finish() == alone[0]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_nothing_waits_for_a_gpu_before_the_end() -> None:
    device = torch.device("cuda")
    expected = begin(logits_of(12), every_kind()).finish()
    begin(logits_of(12).to(device), every_kind()).finish()  # compiles, and makes pinned memory
    logits = logits_of(12).to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        choice = begin(logits, every_kind())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert choice.finish() == expected
