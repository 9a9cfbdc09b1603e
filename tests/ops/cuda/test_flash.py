"""Chunks of prompts by an attention library, decodes beside them by Tern: against the reference, and against Tern.

The libraries are stand-ins with the real ones' signatures; on a GPU those that are installed compute too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from importlib.machinery import ModuleSpec
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from tern.errors import OptionError
from tern.model import Batch
from tern.ops import AttentionWork, Chunks, choose_attention, installed_attention
from tern.ops.cuda import GpuPlan, flash
from tern.ops.placement import interpreted
from tests.compare import assert_close
from tests.model.ernie_fixtures import PagedSequence
from tests.model.test_gpu_network import PROMPT, DeviceDriver, network
from tests.ops.cuda.flash_standins import FlashAttentionStandIn, FlashInferStandIn
from tests.ops.cuda.test_attention import TOLERANCES, Case

StandIn = FlashAttentionStandIn | FlashInferStandIn
NAMES = ("flash-attn", "flashinfer")


def install(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    name = stand_in.module.__name__
    stand_in.module.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, stand_in.module)


@pytest.fixture(params=NAMES)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The one library that is installed."""
    found = FlashAttentionStandIn() if request.param == "flash-attn" else FlashInferStandIn()
    install(found, monkeypatch)
    return found


def work_of(case: Case) -> AttentionWork:
    return AttentionWork(
        device=case.device,
        heads=case.kv_heads * case.group,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        cache_dtype=case.cache or case.dtype,
        block_size=case.block_size,
    )


def opened(case: Case, name: str = "auto") -> flash.AttentionLibrary:
    with interpreted():
        library = choose_attention(name, work_of(case))
    assert library is not None
    return library


def plan_by(case: Case, library: flash.AttentionLibrary | None) -> GpuPlan:
    lengths, contexts = zip(*case.sequences, strict=True)
    starts = np.array([0, *accumulate(lengths)])
    return replace(case.plan(), chunks=Chunks.of(library, starts, np.array(contexts)))


SEQUENCES = [
    [(40, 40)],
    [(300, 300)],
    [(33, 129)],
    [(1, 70), (30, 40), (1, 129), (77, 77), (2, 64), (1, 16)],
    [(20, 200), (1, 1), (0, 9), (13, 13)],
    [(12, 40), (13, 40), (5, 5)],
    [(1, 64), (1, 65), (100, 163)],
]


@pytest.mark.parametrize("sequences", SEQUENCES, ids=str)
def test_a_step_is_the_reference_s(sequences: list[tuple[int, int]], stand_in: StandIn, device: torch.device) -> None:
    case = Case(device, sequences, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    library = opened(case)
    tried = len(stand_in.views)
    found = case.actual(plan_by(case, library))
    assert len(stand_in.views) == tried + 1
    assert_close(found.float(), case.expected(), tolerance=TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize(
    ("block_size", "group", "head_dim", "dtype"),
    [(1, 5, 64, torch.bfloat16), (24, 1, 128, torch.float16), (256, 8, 256, torch.bfloat16)],
)
def test_shapes(
    block_size: int, group: int, head_dim: int, dtype: torch.dtype, stand_in: StandIn, device: torch.device
) -> None:
    sizes = {"block_size": block_size, "group": group, "head_dim": head_dim, "dtype": dtype}
    case = Case(device, [(90, 130), (1, 50), (65, 65)], kv_heads=4, **sizes)
    found = case.actual(plan_by(case, opened(case)))
    assert stand_in.views
    assert_close(found.float(), case.expected(), tolerance=TOLERANCES[dtype])


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("sequences", [SEQUENCES[3], [(12, 40), (40, 40), (1, 9), (5, 90), (64, 70)]], ids=str)
def test_few_queries_are_attended_by_tern(sequences: list[tuple[int, int]], device: torch.device) -> None:
    """Decodes and drafts come out bit by bit as without the library, in the midst of chunks too."""
    case = Case(device, sequences, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    found, own = case.actual(plan_by(case, opened(case))), case.actual()
    few = [rows for rows, _ in sequences for _ in range(rows)]
    mine = torch.tensor(few) <= 12
    assert torch.equal(found[mine], own[mine])
    assert not torch.equal(found, own)


def test_the_cache_is_not_copied(stand_in: StandIn, device: torch.device) -> None:
    case = Case(device, [(40, 90), (20, 20)], kv_heads=4, head_dim=128, dtype=torch.bfloat16)
    case.keys, case.values = case.keys.to(device), case.values.to(device)
    case.actual(plan_by(case, opened(case)))
    keys, values = stand_in.views[-1]
    assert keys.untyped_storage().data_ptr() == case.keys.untyped_storage().data_ptr()
    assert values.untyped_storage().data_ptr() == case.values.untyped_storage().data_ptr()


def test_a_step_is_planned_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = FlashInferStandIn()
    install(stand_in, monkeypatch)
    case = Case(device, [(40, 90), (20, 20)], head_dim=64, dtype=torch.bfloat16)
    library = opened(case)
    tried = stand_in.plans
    for step in range(2):
        plan = plan_by(case, library)
        first = case.actual(plan)
        assert torch.equal(case.actual(plan), first)
        assert stand_in.plans == tried + step + 1


def test_the_chunks_of_a_step() -> None:
    class Nobody:
        name = "nobody"

        def attend(self, *_: object) -> None:
            """Never called."""

    def of(lengths: list[int]) -> Chunks | None:
        return Chunks.of(Nobody(), np.array([0, *accumulate(lengths)]), np.array(lengths) + 10)

    assert of([1, 1]) is None
    assert Chunks.of(None, np.array([0, 9]), np.array([9])) is None
    found = of([1, 1, 40, 1, 5, 30, 1])
    assert found is not None
    assert (found.sequences, found.rows) == (slice(2, 6), slice(2, 78))
    assert found.starts.tolist() == [0, 40, 41, 46, 76]
    assert found.contexts.tolist() == [50, 1, 15, 40]
    assert [found.longest_within(bound) for bound in (1, 4, 5, 12, 30)] == [1, 1, 5, 5, 30]


def test_a_network_s_steps(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill, decode and both, through all layers, as the engine packs them."""
    stand_in = FlashAttentionStandIn()
    install(stand_in, monkeypatch)
    model = network(False, torch.bfloat16, device)
    config = model.config
    work = AttentionWork(
        device=device,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=model.dtype,
        cache_dtype=model.dtype,
        block_size=16,
    )
    with interpreted():
        library = choose_attention("auto", work)

    class LibraryDriver(DeviceDriver):
        def batch(self, chunks: list[tuple[PagedSequence, list[int]]]) -> Batch:
            made = super().batch(chunks)
            lengths = (made.query_starts.cpu().numpy(), made.context_lens.cpu().numpy())
            return replace(made, chunks=Chunks.of(library, *lengths))

    def states(driver: DeviceDriver) -> list[Tensor]:
        first, second = driver.sequence(40), driver.sequence(40)
        steps = [[(first, PROMPT[:33]), (second, PROMPT[:14])], [(first, PROMPT[33:34]), (second, PROMPT[14:39])]]
        return [driver.hidden(step).cpu().float() for step in steps]

    tried = len(stand_in.views)
    with interpreted():
        found, own = states(LibraryDriver(model, block_size=16)), states(DeviceDriver(model, block_size=16))
    assert len(stand_in.views) == tried + 2 * config.num_hidden_layers
    for theirs, mine in zip(found, own, strict=True):
        assert_close(theirs, mine, tolerance=4e-2)


def _adds(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(function)
    def spoiled(**arguments: object) -> Tensor:
        return function(**arguments) + 0.1

    return spoiled


def _is_too_old(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def flash_attn_with_kvcache(q, k_cache, v_cache, block_table=None) -> Tensor:
        return function(q, k_cache, v_cache, page_table=block_table)

    return flash_attn_with_kvcache


def _fails(_: Callable[..., Tensor]) -> None:
    """Not a function at all: what is called raises."""


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_adds, "its results are off by 0.1"),
        (_is_too_old, "of this version takes no cache_seqlens, page_table, cu_seqlens_q"),
        (_fails, "its trial failed"),
    ],
)
def test_a_library_that_fails_its_trial(
    spoil: Callable[..., object],
    words: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stand_in = FlashAttentionStandIn()
    install(stand_in, monkeypatch)
    function = stand_in.module.flash_attn_with_kvcache
    stand_in.module.flash_attn_with_kvcache = spoil(function)  # type: ignore[attr-defined]
    work = work_of(Case(device, [(3, 3)], head_dim=64, dtype=torch.bfloat16))
    with interpreted():
        assert choose_attention("auto", work) is None
        assert words in caplog.text
        with pytest.raises(OptionError, match=words):
            choose_attention("flash-attn", work)


def test_another_that_can_is_taken(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, whole = FlashAttentionStandIn(), FlashInferStandIn()
    install(broken, monkeypatch)
    install(whole, monkeypatch)
    case = Case(device, [(3, 3)], head_dim=64, dtype=torch.bfloat16)
    assert opened(case).name == "flash-attn"
    assert opened(case, "flashinfer").name == "flashinfer"
    broken.module.flash_attn_with_kvcache = _fails  # type: ignore[attr-defined]
    assert opened(case).name == "flashinfer"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs the libraries themselves")
@pytest.mark.parametrize("name", NAMES)
def test_an_installed_library_on_a_gpu(name: str, device: torch.device) -> None:
    if name not in installed_attention():
        pytest.skip(f"{name} is not installed")
    for sequences in (*SEQUENCES, [(1, 9000), (2048, 9000), (1, 5)]):
        case = Case(device, sequences, kv_heads=4, head_dim=128, dtype=torch.bfloat16)
        for cache in (case.keys, case.values):
            cache.nan_to_num_()  # a library may multiply what it then weighs with zero
        found = case.actual(plan_by(case, opened(case, name)))
        assert_close(found.float(), case.expected(), tolerance=TOLERANCES[torch.bfloat16])
