"""Timed steps: that the work is counted right, the report is whole, and nothing is timed that cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tern.bench import MachineLimits, measure_machine, run_bench, step_work
from tern.bench.limits import Work
from tern.bench.overhead import ROOM, decoding, overhead_share
from tern.bench.report import Bench
from tern.checkpoint import PRESETS, load_tensors, resolve_model
from tern.cli import main
from tern.engine.cache_size import token_bytes
from tern.engine.sampler import Sampler
from tern.errors import OptionError
from tern.model import Batch, ErnieModel, KVCache
from tern.ops import cpu


def tern(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tern", *arguments], capture_output=True, text=True, timeout=120)


def test_the_machine_s_limits_are_of_this_world() -> None:
    limits = measure_machine(buffer_bytes=2**24)
    assert (limits.isa, limits.threads) == (cpu.machine().name, cpu.machine().threads)
    assert 0.1 < limits.read_gb_s < 10_000
    assert 0.0005 < limits.int8_tops < 10_000


def test_a_step_s_work_is_what_a_dense_network_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "dense", {**PRESETS["tiny"], "model_type": "ernie4_5"})
    source = resolve_model("dummy:dense")
    config, tensors = source.config, load_tensors(source)
    matrices = [t for name, t in tensors.items() if name.startswith("layers.") and len(t.shape) == 2]
    elements, head = sum(t.numel() for t in matrices), tensors["embed"].numel()
    width = config.num_key_value_heads * config.head_dim
    work = step_work(
        config, tensors, sequences=3, tokens=1, depth=10, kv_token_bytes=token_bytes(config, torch.bfloat16)
    )
    assert work.read_bytes == 2 * (elements + head) + 3 * 11 * 2 * 2 * width * config.num_hidden_layers
    attention = 3 * 11 * 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    assert work.operations == 3 * 2 * (elements + head) + attention


def test_experts_are_read_as_often_as_even_choices_would() -> None:
    source = resolve_model("dummy:tiny")
    tensors = load_tensors(source, quantization="wint4")
    stacks = sum(t.nbytes for name, t in tensors.items() if name.endswith((".moe.gate_up", ".moe.down")))
    share = source.config.moe_k / source.config.moe_num_experts
    sizes = {"tokens": 1, "depth": 0, "kv_token_bytes": 400}
    one = step_work(source.config, tensors, sequences=1, **sizes)
    many = step_work(source.config, tensors, sequences=10_000, **sizes)
    assert many.read_bytes - one.read_bytes == pytest.approx(stacks * (1 - share) + 9_999 * 400)


def test_the_slower_of_reading_and_multiplying_is_the_limit() -> None:
    limits = MachineLimits("none", 1, read_gb_s=10, int8_tops=2)
    assert Work(read_bytes=5e9, operations=1e12).seconds(limits) == 0.5
    assert Work(read_bytes=5e9, operations=4e12).seconds(limits) == 2.0


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_the_timed_step_is_the_network_s_own(kv_cache_dtype: str) -> None:
    """Two ways into the same sequences, prefilled at once or decoded one by one, give the same hidden states."""
    source = resolve_model("dummy:tiny")
    tensors = load_tensors(source, quantization="wint4", dtype=torch.float32)
    bench = Bench(source.config, tensors, 200, kv_cache_dtype=kv_cache_dtype)
    assert bench.kv.keys.any()
    batch = bench.batch(2, 20, 30)
    model = ErnieModel(source.config, tensors)
    kv = KVCache(bench.kv.keys.clone(), bench.kv.values.clone())
    whole = model.hidden(batch, kv).view(2, 20, -1)
    for place in range(20):
        one = bench.batch(2, 1, 30 + place)
        ids = batch.token_ids.view(2, 20)[:, place].clone()
        tables = batch.block_tables[:, : one.block_tables.shape[1]]
        slots = batch.slots.view(2, 20)[:, place]
        step = type(one)(**{**one.__dict__, "token_ids": ids, "block_tables": tables, "slots": slots})
        assert torch.equal(model.hidden(step, bench.kv), whole[:, place])


def test_the_report_is_whole() -> None:
    sizes: dict[str, Any] = {"prefill": [5, 40], "decode": [1, 3], "depths": [0, 20]}
    report = run_bench(resolve_model("dummy:tiny"), quantization="wint4", **sizes, progress=False).as_json()
    kinds = [(r["kind"], r["tokens"], r["sequences"], r["depth"]) for r in report["results"]]
    assert kinds == [
        *[("prefill", 5, 1, 0), ("prefill", 40, 1, 0), ("decode", 1, 1, 0), ("decode", 1, 3, 0)],
        *[("prefill", 5, 1, 20), ("prefill", 40, 1, 20), ("decode", 1, 1, 20), ("decode", 1, 3, 20)],
    ]
    assert all(r["tokens_per_s"] > 0 and r["limit_share"] > 0 for r in report["results"])
    shares = [r["overhead_share"] for r in report["results"]]
    assert [share is None for share in shares] == [True, True, False, False] * 2
    assert all(0 < share < 1 for share in shares if share is not None)
    assert {"read_gb_s", "int8_tops", "isa", "threads"} == set(report["machine"])
    assert report["load_s"] > 0
    assert 0.05 < report["peak_rss_gb"] < 100


@pytest.mark.parametrize("depth", [0, 1, 40, 8191])
def test_a_step_in_the_engine_is_timed_at_the_same_depth(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve_model("dummy:tiny")
    bench = Bench(source.config, load_tensors(source, quantization="wint4"), 2 * (depth + 17), 2)
    rows: list[list[int]] = []
    hidden = ErnieModel.hidden

    def record(model: ErnieModel, batch: Batch, kv: KVCache) -> torch.Tensor:
        rows.append(batch.context_lens.tolist())
        return hidden(model, batch, kv)

    monkeypatch.setattr(ErnieModel, "hidden", record)
    assert 0 < overhead_share(bench.engine, bench.model, 2, depth) < 1
    assert {len(lengths) for lengths in rows} == {2}
    first = min(max(1, depth), 8192 - ROOM) + (0 if depth < 2 else 1)  # a longer prompt is not read, only taken
    assert rows[0] == [first, first]
    assert len(rows) >= 18
    assert not bench.engine.has_work
    bench.engine.check_integrity()


def test_sequences_whose_prompts_were_skipped_go_on_differently() -> None:
    """Or all would choose the same experts, and a step of many would read too few."""
    source = resolve_model("dummy:tiny")
    bench = Bench(source.config, load_tensors(source, quantization="wint4"), 8 * (40 + 17), 8)
    with decoding(bench.engine, bench.model, 8, 40) as step:
        before = [list(sequence.token_ids) for sequence in bench.engine.sequences.values()]
        step()
        after = [list(sequence.token_ids) for sequence in bench.engine.sequences.values()]
    assert len({tokens[40] for tokens in before}) == len({tokens[-1] for tokens in after}) == 8
    assert [len(tokens) for tokens in after] == [len(tokens) + 1 for tokens in before]


def test_the_engine_s_share_is_what_its_model_did_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def taking(seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            nonlocal now
            now += seconds
            return call(*arguments)

        return timed

    monkeypatch.setattr("tern.bench.overhead.time.perf_counter", lambda: now)
    monkeypatch.setattr(ErnieModel, "hidden", taking(5.0, ErnieModel.hidden))
    monkeypatch.setattr(ErnieModel, "logits", taking(1.0, ErnieModel.logits))
    monkeypatch.setattr(Sampler, "begin", taking(2.0, Sampler.begin))
    source = resolve_model("dummy:tiny")
    bench = Bench(source.config, load_tensors(source, quantization="wint4"), 40)
    assert overhead_share(bench.engine, bench.model, 1, 4) == 0.25


def test_what_does_not_fit_is_said_before_it_is_loaded() -> None:
    source = resolve_model("dummy:ernie-4.5-21b-a3b")
    complaint = "A context of 131073 tokens is asked for, but the model has 131072 positions"
    with pytest.raises(OptionError, match=complaint):
        run_bench(source, quantization="wint4", prefill=[], decode=[1], depths=[131072])


def test_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    run = tern("bench", "--model", "dummy:tiny", "--quantization", "wint4", "--prefill", "8", "--decode", "1", "--json")
    assert run.returncode == 0, run.stderr
    assert len(json.loads(run.stdout)["results"]) == 2
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--prefill", "", "--decode", "2"])
    assert ended.value.code == 0
    plain = capsys.readouterr().out
    assert "2 sequences" in plain
    assert "of the limit" in plain
    for wrong in (("--prefill", "many"), ("--decode", "0"), ("--depth", "-1"), ("--quantization", "int3")):
        with pytest.raises(SystemExit) as ended:
            main(["bench", *wrong])
        assert ended.value.code == 2, wrong
        assert capsys.readouterr().err.startswith("tern: ")
