"""Timed steps: that the work is counted right, the report is whole, and nothing is timed that cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tern.bench import MachineLimits, diagnose, measure_machine, run_bench, step_work
from tern.bench.limits import Work
from tern.bench.report import Bench
from tern.checkpoint import PRESETS, load_tensors, resolve_model, weight_bytes
from tern.errors import OptionError
from tern.model import ErnieModel, KVCache
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
    work = step_work(config, tensors, sequences=3, tokens=1, depth=10, kv_itemsize=2)
    assert work.read_bytes == 2 * (elements + head) + 3 * 11 * 2 * 2 * width * config.num_hidden_layers
    attention = 3 * 11 * 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    assert work.operations == 3 * 2 * (elements + head) + attention


def test_experts_are_read_as_often_as_even_choices_would() -> None:
    source = resolve_model("dummy:tiny")
    tensors = load_tensors(source, quantization="wint4")
    stacks = sum(t.nbytes for name, t in tensors.items() if name.endswith((".moe.gate_up", ".moe.down")))
    share = source.config.moe_k / source.config.moe_num_experts
    sizes = {"tokens": 1, "depth": 0, "kv_itemsize": 2}
    one = step_work(source.config, tensors, sequences=1, **sizes)
    many = step_work(source.config, tensors, sequences=10_000, **sizes)
    kv = 2 * 2 * source.config.num_hidden_layers * source.config.num_key_value_heads * source.config.head_dim
    assert many.read_bytes - one.read_bytes == pytest.approx(stacks * (1 - share) + 9_999 * kv)


def test_the_slower_of_reading_and_multiplying_is_the_limit() -> None:
    limits = MachineLimits("none", 1, read_gb_s=10, int8_tops=2)
    assert Work(read_bytes=5e9, operations=1e12).seconds(limits) == 0.5
    assert Work(read_bytes=5e9, operations=4e12).seconds(limits) == 2.0


def test_the_timed_step_is_the_network_s_own() -> None:
    """Two ways into the same sequences, prefilled at once or decoded one by one, give the same hidden states."""
    source = resolve_model("dummy:tiny")
    tensors = load_tensors(source, quantization="wint4", dtype=torch.float32)
    bench = Bench(source.config, tensors, 200)
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
    assert {"read_gb_s", "int8_tops", "isa", "threads"} == set(report["machine"])
    assert report["load_s"] > 0
    assert 0.05 < report["peak_rss_gb"] < 100


def test_what_does_not_fit_is_said_before_it_is_loaded() -> None:
    source = resolve_model("dummy:ernie-4.5-21b-a3b")
    complaint = "A context of 131073 tokens is asked for, but the model has 131072 positions"
    with pytest.raises(OptionError, match=complaint):
        run_bench(source, quantization="wint4", prefill=[], decode=[1], depths=[131072])


def test_the_commands() -> None:
    run = tern("bench", "--model", "dummy:tiny", "--quantization", "wint4", "--prefill", "8", "--decode", "1", "--json")
    assert run.returncode == 0, run.stderr
    assert len(json.loads(run.stdout)["results"]) == 2
    plain = tern("bench", "--prefill", "", "--decode", "2")
    assert "2 sequences" in plain.stdout
    assert "of the limit" in plain.stdout
    for wrong in (("--prefill", "many"), ("--decode", "0"), ("--depth", "-1"), ("--quantization", "int3")):
        refused = tern("bench", *wrong)
        assert refused.returncode == 2, wrong
        assert refused.stderr.startswith("tern: ")


def test_doctor_counts_what_would_be_loaded(tmp_path: Path) -> None:
    source = resolve_model("dummy:tiny")
    for quantization in (None, "wint8", "wint4"):
        loaded = load_tensors(source, quantization=quantization, dtype=torch.bfloat16)
        assert weight_bytes(source.config, torch.bfloat16, quantization) == sum(t.nbytes for t in loaded.values())
    found = diagnose(source)
    assert [fit.precision for fit in found.fits] == ["bfloat16", "wint8", "wint4"]
    assert found.default == "bfloat16"
    assert found.machine.isa == cpu.machine().name
    assert all(fit.longest_context == source.config.max_position_embeddings for fit in found.fits)

    quantised = tern("quantize", "dummy:tiny", str(tmp_path / "out"), "--bits", "4")
    assert quantised.returncode == 0, quantised.stderr
    assert "Try it: tern chat" in quantised.stderr
    report = tern("doctor", str(tmp_path / "out"), "--json")
    assert [fit["precision"] for fit in json.loads(report.stdout)["fits"]] == ["wint4"]
    assert "kernels" in tern("doctor").stdout
    assert tern("quantize", "dummy:tiny", str(tmp_path / "two"), "--bits", "2").returncode == 2
