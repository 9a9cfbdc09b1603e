"""The table of a GPU, end to end on the CPU: its order, its budget, rows that fail, and limits without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Budget, Measured, Table, measure
from benchmarks.gpu_plan import Row, plan, row_limits
from benchmarks.gpu_steps import Timed, time_row
from benchmarks.gpu_transformers import seconds_per_token
from tern.bench import GpuLimits, MachineLimits
from tern.bench.gpu import DATA_SHEETS
from tern.bench.overhead import ROOM
from tern.checkpoint import load_tensors, resolve_model

CPU = torch.device("cpu")
SLOW = MachineLimits("none", 1, read_gb_s=1000.0, int8_tops=1000.0)
CARD = GpuLimits("Some GPU", 141.0, 4300.0, 790.0, 1580.0)
SMALL = ["--model", "dummy:tiny", "--device", "cpu", "--batches", "2", "--batch-depth", "16", "--prefill", "32"]
SOURCE = resolve_model("dummy:tiny")
WHOLE = {"batches": [32, 256], "batch_depth": 1024, "prefill": 8192, "context": 131072}


@pytest.fixture(autouse=True)
def _known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEARDOWN_CUPTI", "DISABLE_CUPTI_LAZY_REINIT"):  # what is set is unset again
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("tern.bench.gpu.measure_machine", lambda: SLOW)


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    gpu.main([*SMALL, "--context", "128", "--json", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["limits"]["read_gb_s"] == 1000.0
    assert found["setting"]["command"].startswith("python -m benchmarks.gpu --model dummy:tiny")
    rows = {row["label"]: row for row in found["rows"]}
    assert list(rows) == [row.label for row in plan(batches=[2], batch_depth=16, prefill=32, context=128)]
    for label in (
        "decode 1 sequence at depth 0, bf16",
        "decode 1 sequence at depth 0, wint4",
        "decode 2 sequences at depth 16, bf16",
        "prefill 32, bf16",
        f"decode 1 sequence at depth {128 - ROOM}, bf16",
        "prompt of 128 to its first token, bf16",
        "decode 1 sequence at depth 0, bf16, transformers",
    ):
        assert rows[label]["note"] is None, rows[label]
        assert rows[label]["figure"] > 0
        assert 0 < rows[label]["share"] < 1
    assert all(row["figure"] or row["note"] for row in found["rows"])
    refused = rows["decode 1 sequence at depth 0, fp8"]["note"]
    assert refused.startswith("skipped: quantization is 'fp8'"), "which is a GPU's"
    for profile in found["profiles"]:
        times = [kernel["ms"] for kernel in profile["kernels"]]
        assert times == sorted(times, reverse=True)
        assert 0 < sum(times) <= profile["busy_ms"] * 1.001
    said = capsys.readouterr().out
    table = said.split("In order of importance:\n")[1].splitlines()
    assert [line.startswith(label) for line, label in zip(table, rows, strict=False)] == [True] * len(rows)
    assert "decode 2 sequences at depth 16, bf16: a step of" in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_program_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    gpu.main([*SMALL, "--device", "cuda", "--context", "128", "--json", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["setting"]["gpu"] == torch.cuda.get_device_name()
    assert found["limits"]["copy_gb_s"] > 100
    for row in found["rows"]:
        assert row["figure"] is not None or row["note"]
        assert row["figure"] is not None or ", bf16" not in row["label"] or "fp8" in row["label"], row
    plain = next(profile for profile in found["profiles"] if profile["label"] == "decode 1 sequence at depth 0, bf16")
    assert plain["kernels"]
    assert plain["busy_ms"] > 0


def test_rows_stand_by_importance_and_precisions_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = plan(**WHOLE)
    assert [row.label for row in rows[:3]] == [
        f"decode 1 sequence at depth 0, {precision}" for precision in ("bf16", "fp8", "wint4")
    ]
    assert len({row.label for row in rows}) == len(rows)
    assert sum(row.seconds for row in rows) + 3 * gpu.LOADING_SECONDS < 600, "the whole table fits ten minutes"
    loaded: list[str | None] = []
    timed: list[Row] = []

    def load(*_: object, quantization: str | None, **__: object) -> dict[str, object]:
        loaded.append(quantization)
        return {}

    monkeypatch.setattr(gpu, "load_tensors", load)
    monkeypatch.setattr(gpu, "EngineOptions", lambda **_: None)
    monkeypatch.setattr(gpu, "time_row", lambda row, *_, **__: timed.append(row) or Timed(1.0, 2.0))
    monkeypatch.setattr(gpu, "seconds_per_token", lambda *_: 1.0)
    table = Table(rows, lambda _: None)
    measure(SOURCE, CPU, CARD, table, Budget(600.0))
    assert loaded == [None, "fp8", "wint4"]
    assert len(timed) == len(rows) - 1
    assert table.measured.keys() == set(rows)


def test_a_row_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = plan(batches=[2], batch_depth=16, prefill=32, context=128)

    def fails_once(row: Row, *_: object, **__: object) -> Timed:
        if row.kind == "prefill":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return Timed(1.0, 2.0)

    def unloadable(*_: object, quantization: str | None, **__: object) -> dict[str, object]:
        if quantization == "wint4":
            raise RuntimeError("no kernel for these weights")
        return {}

    def absent(*_: object) -> float:
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(gpu, "time_row", fails_once)
    monkeypatch.setattr(gpu, "load_tensors", unloadable)
    monkeypatch.setattr(gpu, "seconds_per_token", absent)
    heard: list[Measured] = []
    table = Table(rows, heard.append)
    measure(SOURCE, CPU, SLOW, table, Budget(600.0))
    notes = {row: table.measured[row].note for row in rows}
    assert notes[rows[0]] is None
    assert notes[rows[2]] == "failed: RuntimeError: no kernel for these weights"
    by_kind = {row.kind: notes[row] for row in rows if row.kind != "decode"}
    assert by_kind == {
        "prefill": "failed: OutOfMemoryError: CUDA out of memory. Tried to allocate",
        "first token": None,
    }
    assert notes[rows[-1]] == "skipped: No module named 'transformers': pip install transformers"
    assert len(heard) == len(rows)


def test_what_does_not_fit_the_budget_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("benchmarks.gpu.time.monotonic", lambda: now)
    rows = [Row("decode"), Row("decode", depth=5), Row("prefill", tokens=9), Row("decode", engine="transformers")]

    def minutes(*_: object, **__: object) -> Timed:
        nonlocal now
        now += 60.0
        return Timed(1.0, 2.0)

    monkeypatch.setattr(gpu, "load_tensors", lambda *_, **__: {})
    monkeypatch.setattr(gpu, "time_row", minutes)
    monkeypatch.setattr(gpu, "seconds_per_token", lambda *_: 1.0)
    table = Table(rows, lambda _: None)
    measure(SOURCE, CPU, SLOW, table, Budget(135.0, started=0.0))
    notes = [table.measured[row].note for row in rows]
    assert notes[:2] == [None, None]
    assert notes[2] == "skipped: takes about 20 s, 15 of --budget-seconds are left"
    assert notes[3] == "skipped: takes about 20 s, 15 of --budget-seconds are left"
    table = Table(rows, lambda _: None)
    measure(SOURCE, CPU, SLOW, table, Budget(90.0, started=now))
    assert {measured.note for measured in table.measured.values()} == {
        "skipped: takes about 95 s, 90 of --budget-seconds are left",
        None,
    }, "loading counts"


def test_figures_shares_and_limits_are_of_one_kind() -> None:
    decode = Measured.of(Row("decode", sequences=8, target=9.0), 100.0, 400.0)
    assert (decode.share, decode.target, decode.unit) == (0.25, 9.0, "tokens/s")
    assert Row("decode", sequences=8).figure(0.5) == 16.0
    assert Row("prefill", tokens=8).figure(0.5) == 16.0
    first = Row("first token", tokens=8)
    assert first.figure(0.5) == 0.5
    assert Measured.of(first, 0.5, 0.1).share == 0.2


def test_the_limits_are_those_of_the_bytes() -> None:
    """By hand: 6.71 GB of bf16 a token, 57.3 KB a token of context, 6 of 64 experts a row."""
    config = resolve_model("dummy:ernie-4.5-21b-a3b").config
    limits = {one.label: one for one in row_limits(plan(**WHOLE), config, CARD)}
    assert limits["decode 1 sequence at depth 0, bf16"].figure == pytest.approx(4300 / 6.71, rel=0.005)
    assert limits["decode 1 sequence at depth 0, fp8"].figure == pytest.approx(2 * 4300 / 6.71, rel=0.01)
    fixed, experts = 2.88, 27 * 64 * 3 * 2560 * 1536 * 2 / 1e9
    read = fixed + experts * (1 - (1 - 6 / 64) ** 32) + 32 * 1025 * 57344 / 1e9
    assert limits["decode 32 sequences at depth 1024, bf16"].figure == pytest.approx(32 * 4300 / read, rel=0.01)
    deep = 4300 / (6.71 + 7.5)
    assert limits[f"decode 1 sequence at depth {131072 - ROOM}, bf16"].figure == pytest.approx(deep, rel=0.01)
    prefill = limits["prefill 8192, bf16"]
    assert (prefill.bound, prefill.unit) == ("multiplying", "tokens/s")
    first = limits["prompt of 131072 to its first token, bf16"]
    assert (first.bound, first.unit) == ("multiplying", "s")
    attention = 4 * 28 * 20 * 128 * 131072**2 / 2
    assert first.figure == pytest.approx((131072 * 6.17e9 + attention) / 790e12, rel=0.01)
    for label, one in limits.items():
        assert one.bound == ("reading" if label.startswith("decode") else "multiplying"), label


def test_the_document_has_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--limits", "H200"])
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == DATA_SHEETS["H200"].words
    document = Path(__file__).parents[2] / "docs" / "performance.md"
    assert printed in document.read_text(encoding="utf-8"), "see docs/performance.md, On a GPU"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert "device is 'cuda'" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--prefill", "9000"], ["--context", "8193"], ["--batch-depth", "8161"]])
def test_lengths_beyond_the_model(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main([*SMALL, *wrong])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{wrong[0]} is {wrong[1]}, but dummy:tiny has 8192 positions: give a number from 1 to")


def test_a_profiler_that_fails_loses_only_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("CUPTI is missing")

    monkeypatch.setattr("benchmarks.gpu_steps.profile", broken)
    tensors = load_tensors(SOURCE, quantization="wint4", progress=False)
    timed = time_row(Row("decode", "wint4", depth=8), SOURCE.config, tensors, SLOW)
    assert timed.figure > 0
    assert (timed.profile, timed.no_profile) == (None, "RuntimeError: CUPTI is missing")
    timed = time_row(Row("decode", "wint4", depth=8), SOURCE.config, tensors, SLOW, profiled=False)
    assert timed.figure > 0
    assert (timed.profile, timed.no_profile) == (None, None)


def test_transformers_decodes_the_same_network() -> None:
    assert 0 < seconds_per_token(SOURCE.raw_config, CPU) < 10
