"""Decode steps over static buffers, padded: exactly what the same steps give unpadded. On a GPU, replayed as graphs."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from engine_fakes import StandInGraphs, add, make_engine, make_request, run
from test_engine_model import ANSWER, PROMPTS, SMALL, build, network, plain_answer

from tern.engine import Engine
from tern.engine import engine as engine_module
from tern.engine.graphs import Capture, Compute, GraphLimits, StepGraphs, capture_for, drafted_sizes, graph_sizes
from tern.engine.packing import PackedStep, pack
from tern.engine.sampling_state import SamplingState
from tern.engine.scheduler import Chunk
from tern.engine.sequence import Sequence as EngineSequence
from tern.model import ErnieModel, KVCache
from tern.model.batch import Batch

BLOCK = 4
ROWS = 11  # no power of two, and no multiple of 8
BLOCKS = 40
DRAFTS = 4
LENGTH = int(SMALL["max_position_embeddings"])  # type: ignore[call-overload]


def test_sizes_are_those_of_the_field_up_to_the_largest_step() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(8) == [1, 2, 4, 8]
    assert graph_sizes(30) == [1, 2, 4, 8, 16, 24, 30]
    assert graph_sizes(256)[-3:] == [240, 248, 256]


def test_what_has_the_most_rows_is_captured_first() -> None:
    rows: list[int] = []

    def compute(batch: Batch) -> torch.Tensor:
        rows.append(len(batch.token_ids))
        return torch.zeros(len(batch.token_ids), 1)

    def capture(graph: Compute) -> Compute:
        graph()
        return graph

    limits = GraphLimits(256, DRAFTS, LENGTH, BLOCK, spare_block=BLOCKS)
    StepGraphs(compute, torch.device("cpu"), limits, capture=capture)
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == 256
    assert rows.count(64) == 2, "with drafts and without"


def test_graphs_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reuses what is free in a pool on the stream alone that it was allocated on."""
    captured: list[tuple[object, object]] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            assert device == torch.device("cuda:1")

        def wait_stream(self, _: object) -> None: ...

    @contextmanager
    def graph(_: object, *, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:  # noqa: ARG001
        captured.append((pool, stream))
        yield

    device = torch.device("cuda:1")
    fakes = {"Stream": Stream, "graph": graph, "CUDAGraph": object, "graph_pool_handle": object}
    fakes |= {"stream": nullcontext, "current_stream": Stream}
    for name, fake in fakes.items():
        monkeypatch.setattr(f"torch.cuda.{name}", fake)
    capture = capture_for(device, enforce_eager=False)
    assert capture is not None
    for _ in range(3):
        capture(lambda: torch.zeros(1))
    assert len(captured) == 3
    assert len(set(captured)) == 1


def test_steps_with_drafts_have_sizes_of_their_own() -> None:
    assert drafted_sizes(256, 0) == []
    assert drafted_sizes(256, 8) == [2, 4, 8, 16, 32, 64]
    assert drafted_sizes(1, 1) == [2]
    assert drafted_sizes(1, 8) == [2, 4, 8, 9]
    assert drafted_sizes(4, 3) == [2, 4, 8, 16]


def cache(model: ErnieModel) -> KVCache:
    """A cache of random content, and one block more for padding, which holds NaN."""
    kv = KVCache.allocate(model.config, num_blocks=BLOCKS + 1, block_size=BLOCK, dtype=model.dtype, device=model.device)
    for seed, part in enumerate((kv.keys, kv.values)):
        part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(seed)))
        part[:, :, BLOCKS] = float("nan")
    return kv


def captured(model: ErnieModel, kv: KVCache, sequences: int = ROWS, *, by: Capture | None = None) -> StepGraphs:
    limits = GraphLimits(sequences, DRAFTS, LENGTH, BLOCK, spare_block=BLOCKS)
    return StepGraphs(partial(model.hidden, kv=kv), model.device, limits, capture=by or StandInGraphs())


def decode(sequences: int, shift: int = 0, drafts: Sequence[int] = (0,)) -> PackedStep:
    """A decode of so many sequences, of 1 to 12 tokens each, in blocks of their own; they have `drafts` in turn."""
    chunks = []
    for row in range(sequences):
        length = 1 + (row * 5 + shift) % 12
        request = make_request(str(row), [(row * 7 + place + shift) % 300 + 3 for place in range(length)])
        sequence = EngineSequence(
            request, max_length=LENGTH, stop_ids=frozenset(), sampling=SamplingState(request, frozenset())
        )
        sequence.num_computed_tokens = length - 1
        guesses = tuple((row * 11 + place) % 300 for place in range(drafts[row % len(drafts)]))
        first = (row + shift) % ROWS * 3
        sequence.block_table = array("q", range(first, first + -(-(length + len(guesses)) // BLOCK)))
        chunks.append(Chunk(sequence, 1, samples=True, drafts=guesses))
    return pack(chunks, BLOCK)


def unpadded(model: ErnieModel, kv: KVCache, step: PackedStep) -> torch.Tensor:
    return model.hidden(step.on(model.device), kv)


@pytest.mark.parametrize("drafts", [[0], [2], [0, 3, 1], [4, 0]], ids=str)
@pytest.mark.parametrize("architecture", ["dense", "moe bf16", "moe wint4"])
def test_padded_steps_give_what_unpadded_ones_give(architecture: str, drafts: list[int]) -> None:
    model = network(architecture)
    plain, padded = cache(model), cache(model)
    graphs = captured(model, padded)
    for sequences in [*range(1, ROWS + 1), 1, ROWS, 2]:
        step = decode(sequences, sequences, drafts)
        assert graphs.takes(step)
        hidden = graphs.run(step)
        wanted = unpadded(model, plain, step)
        assert wanted.isfinite().all()
        assert torch.equal(hidden, wanted)
        assert torch.equal(model.logits(hidden), model.logits(wanted))
        for part, whole in ((padded.keys, plain.keys), (padded.values, plain.values)):
            assert torch.equal(part[:, :, :BLOCKS], whole[:, :, :BLOCKS]), "padding wrote where others' keys are"


@pytest.mark.parametrize("ahead", [False, True])
def test_padding_is_the_row_of_the_shortest_context_and_so_wants_no_other_expert(ahead: bool) -> None:
    model, graphs = network("moe bf16"), StandInGraphs()
    captured_steps = captured(model, cache(model), by=graphs)
    step = decode(5, shift=8) if ahead else decode(3, shift=8, drafts=[1, 0, 1])
    tokens = torch.from_numpy(step.token_ids.copy())
    if ahead:
        step.token_ids[:] = 0
    captured_steps.run(step, tokens if ahead else None)
    output = next(output for output in graphs.outputs if len(output) == 8 and output.isfinite().all())
    shortest = int(step.positions.argmin())
    assert shortest > 0
    assert torch.equal(output[5:], output[shortest].expand(3, -1))


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_tokens_may_come_from_the_device(rows: int) -> None:
    model = network("dense")
    graphs = captured(model, cache(model))
    step = decode(rows)
    wanted = graphs.run(step).clone()
    tokens = torch.from_numpy(step.token_ids.copy())
    step.token_ids[:] = 0
    assert torch.equal(graphs.run(step, tokens), wanted)
    assert not torch.equal(graphs.run(step), wanted)


def test_kernels_find_what_arrives_at_multiples_of_16_bytes() -> None:
    """They are compiled once more for what does not begin there."""
    batches: list[Batch] = []

    def noted(compute: Compute) -> Compute:
        batches.append(compute.args[0])  # type: ignore[attr-defined]
        return compute

    model = network("dense")
    captured(model, cache(model), by=noted)
    assert len(batches[0].token_ids) > len(batches[-1].token_ids) == 1
    for batch in batches:
        for tensor in (batch.token_ids, batch.positions, batch.slots, batch.query_starts, batch.context_lens):
            assert (tensor.data_ptr() - batches[0].token_ids.data_ptr()) % 16 == 0
        assert batch.block_tables.shape[1] == -(-LENGTH // BLOCK)


def test_only_decodes_of_few_enough_rows_are_taken() -> None:
    model = network("dense")
    graphs = captured(model, cache(model), sequences=4)
    assert graphs.takes(decode(4))
    assert not graphs.takes(decode(5))
    assert graphs.takes(decode(4, drafts=[DRAFTS]))
    assert not graphs.takes(decode(1, drafts=[DRAFTS + 1]))
    assert not graphs.takes(decode(5, drafts=[DRAFTS]))
    request = make_request("a", [5, 6, 7])
    sequence = EngineSequence(
        request, max_length=LENGTH, stop_ids=frozenset(), sampling=SamplingState(request, frozenset())
    )
    sequence.block_table = array("q", [0, 1])
    assert not graphs.takes(pack([Chunk(sequence, 3, samples=True)], BLOCK))
    assert not graphs.takes(pack([Chunk(sequence, 1, samples=False)], BLOCK))


@pytest.mark.parametrize(
    "options", [{}, {"async_scheduling": True}, {"block_size": 5, "speculation": "ngram"}], ids=str
)
@pytest.mark.parametrize("architecture", ["moe", "moe bf16", "moe mtp"])
def test_answers_are_the_networks_own(
    architecture: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = StandInGraphs()
    monkeypatch.setattr(engine_module, "capture_for", lambda *_, **__: graphs)
    speculation = {"speculation": "mtp"} if "mtp" in architecture else {}
    engine = build(architecture, **{**options, **speculation})
    sinks = [
        add(engine, str(number), prompt, max_tokens=ANSWER, ignore_eos=True) for number, prompt in enumerate(PROMPTS)
    ]
    run(engine)
    assert [sink.ids for sink in sinks] == [plain_answer(architecture, number) for number in range(len(PROMPTS))]
    assert graphs.replays > 0
    if not speculation:
        assert (engine.pipeline.steps_ahead > 0) == ("async_scheduling" in options)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"speculation": "off"}, []),
        ({"speculation": "ngram"}, [2, 4, 8, 9]),
        ({"speculation": "ngram", "num_speculative_tokens": 2}, [2, 3]),
    ],
    ids=str,
)
def test_graphs_for_drafts_are_captured_where_there_may_be_some(options: dict[str, Any], sizes: list[int]) -> None:
    graphs = make_engine(graphs=StandInGraphs(), max_num_seqs=1, **options).runner.graphs
    assert graphs is not None
    assert (graphs.sizes, graphs.drafted_sizes) == ([1], sizes)


def test_the_spare_block_is_nobodys() -> None:
    engine = make_engine(graphs=StandInGraphs(), num_kv_blocks=30)
    assert engine.pool.num_blocks == 30
    assert engine.runner.kv.keys.shape[2] == 31
    assert make_engine(num_kv_blocks=30).runner.kv.keys.shape[2] == 30


def test_what_cannot_be_captured_runs_without(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Compute) -> Compute:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(engine_module, "capture_for", lambda *_, **__: refuse)
    with caplog.at_level(logging.ERROR):
        engine: Engine = build("dense")
    assert engine.runner.graphs is None
    assert "cannot be captured" in caplog.text
    sink = add(engine, "a", PROMPTS[0], max_tokens=ANSWER, ignore_eos=True)
    run(engine)
    assert sink.ids == plain_answer("dense", 0)


def test_the_processor_captures_nothing() -> None:
    assert capture_for(torch.device("cpu"), enforce_eager=False) is None
    assert capture_for(torch.device("cuda"), enforce_eager=True) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("speculation", ["off", "ngram"])
@pytest.mark.parametrize("ahead", [False, True], ids=["one by one", "ahead"])
def test_a_gpu_answers_the_same_with_and_without(eager: bool, ahead: bool, speculation: str) -> None:
    from tern.checkpoint import resolve_model
    from tern.engine import EngineOptions

    def answers(**options: Any) -> list[list[int]]:
        chosen = EngineOptions(device="cuda", dtype="bfloat16", num_kv_blocks=200, max_model_len=256, **options)
        engine = Engine.open(resolve_model(None), chosen, progress=False)
        assert (engine.runner.graphs is None) == options["enforce_eager"]
        sinks = [add(engine, str(n), p, max_tokens=ANSWER, ignore_eos=True) for n, p in enumerate(PROMPTS)]
        run(engine)
        return [sink.ids for sink in sinks]

    wanted = answers(enforce_eager=True, async_scheduling=False, speculation="off")
    assert answers(enforce_eager=eager, async_scheduling=ahead, speculation=speculation) == wanted
