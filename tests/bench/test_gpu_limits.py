"""A GPU's limits: what they make of work, what a data sheet says, and that weights are counted as they would be loaded.

What is measured on a GPU is the same functions on a device; here they run on the CPU, with `make test-gpu` on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tern.bench import BenchReport, BenchResult, GpuLimits, Setting, measure_device, run_bench, step_work
from tern.bench.draw import Destination
from tern.bench.draw_steps import steps_figure
from tern.bench.gpu import (
    DATA_SHEETS,
    copy_rate,
    fp8_product_rate,
    measure_gpu,
    product_rate,
    take_device,
    weight_sizes,
)
from tern.bench.limits import Work
from tern.bench.overhead import SkippingModel
from tern.bench.report import Bench, prompt_chunks
from tern.bench.timer import Timer
from tern.checkpoint import load_tensors, resolve_model
from tern.cli import main
from tern.errors import OptionError
from tern.ops import PackedWeight, RowPackedWeight, round_to_fp8

CPU = torch.device("cpu")
CARD = GpuLimits("Some GPU", 100.0, 1000.0, 200.0, 400.0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_fp8_weights_are_multiplied_in_fp8() -> None:
    assert Work(read_bytes=0, operations=2e14, fp8_operations=4e14).seconds(CARD) == 2.0
    assert Work(read_bytes=5e12, operations=2e14, fp8_operations=4e14).seconds(CARD) == 5.0
    older = GpuLimits("Older GPU", 80.0, 1000.0, 200.0)
    assert Work(read_bytes=0, operations=2e14, fp8_operations=4e14).seconds(older) == 3.0
    assert CARD.words == "Some GPU, moves 1000 GB/s, 200 bf16 TFLOP/s, 400 fp8"
    assert "fp8" not in older.words


def test_weights_are_counted_as_they_would_be_loaded() -> None:
    source = resolve_model("dummy:tiny")
    config = source.config
    plain = {name: tensor for name, tensor in load_tensors(source).items() if isinstance(tensor, torch.Tensor)}
    sizes = weight_sizes(config, None)
    assert {name: (tuple(size.shape), size.nbytes) for name, size in sizes.items()} == {
        name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in plain.items()
    }
    for bits in (4, 8):
        sizes = weight_sizes(config, f"wint{bits}")
        loaded = load_tensors(source, quantization=f"wint{bits}")
        assert sizes.keys() == loaded.keys()
        for name, weight in loaded.items():
            real = RowPackedWeight.of(weight) if isinstance(weight, PackedWeight) else weight
            assert (tuple(sizes[name].shape), sizes[name].nbytes) == (tuple(real.shape), real.nbytes), name
    for quantization in ("fp8", "block_wise_fp8"):
        for name, size in weight_sizes(config, quantization).items():
            if isinstance(size, torch.Tensor):
                assert not name.endswith((".weight", ".gate_up", ".down", "head")), name
                continue
            real = round_to_fp8(plain.get(name, plain["embed"]), block_wise=quantization == "block_wise_fp8")
            assert (tuple(size.shape), size.nbytes) == (real.shape, real.nbytes), name


def test_fp8_operations_are_those_of_fp8_weights() -> None:
    config = resolve_model("dummy:tiny").config
    sizes = {"sequences": 3, "tokens": 1, "depth": 10, "kv_token_bytes": 0}
    plain = step_work(config, weight_sizes(config, None), **sizes)
    rounded = step_work(config, weight_sizes(config, "fp8"), **sizes)
    assert plain.fp8_operations == 0
    assert rounded.operations + rounded.fp8_operations == pytest.approx(plain.operations)
    routers = 2 * 3 * 3 * config.moe_num_experts * config.hidden_size  # of three layers, three rows
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * 3 * 11
    assert rounded.operations == routers + attention


def test_the_whole_model_reads_what_was_counted_by_hand() -> None:
    """3.35 billion parameters a token and 57.3 KB a token of context, of the 21B-A3B."""
    config = resolve_model("dummy:ernie-4.5-21b-a3b").config
    sizes = {"sequences": 1, "tokens": 1, "depth": 0, "kv_token_bytes": 57_344}
    assert step_work(config, weight_sizes(config, None), **sizes).read_bytes == pytest.approx(6.71e9, rel=0.005)
    assert step_work(config, weight_sizes(config, "fp8"), **sizes).read_bytes == pytest.approx(3.37e9, rel=0.005)
    assert list(DATA_SHEETS) == ["H100", "H200"]


def test_prompts_are_cut_into_steps() -> None:
    assert prompt_chunks(5, 8) == [(0, 5)]
    assert prompt_chunks(16, 8) == [(0, 8), (8, 8)]
    assert prompt_chunks(17, 8) == [(0, 8), (8, 8), (16, 1)]


def test_a_timer_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("torch.cuda.synchronize", lambda _: told.append("waited"))
    clock = itertools.count(step=2.5)
    monkeypatch.setattr("tern.bench.timer.time.perf_counter", lambda: next(clock))
    taken = Timer(torch.device("cuda:0")).seconds(lambda: told.append("worked"))
    assert told == ["waited", "worked", "waited"]
    assert taken == 2.5
    told.clear()
    assert Timer(CPU).seconds(lambda: None) == Timer(CPU).device_seconds(lambda: None) == 2.5
    assert told == []


@pytest.mark.parametrize("rate", [copy_rate, product_rate, fp8_product_rate])
def test_rates_count_what_was_done(rate: Callable[[torch.device, int], float], monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[float] = []

    def timed(_: Timer, work: Callable[[], object]) -> float:
        work()
        runs.append(float(len(runs) + 1))
        return runs[-1]

    monkeypatch.setattr(Timer, "device_seconds", timed)
    found = rate(CPU, 64)
    assert len(runs) == 7
    assert found == (2 * 64 if rate is copy_rate else 2 * 64**3) / 4.0, "of the median of 1 to 7 seconds"


def test_devices_that_cannot_be(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert take_device("auto") == take_device("cpu") == CPU
    for wrong in ("cuda", "cuda:1", "gpu"):
        with pytest.raises(OptionError, match=f"device is '{wrong}'"):
            take_device(wrong)
        with pytest.raises(SystemExit) as ended:
            main(["bench", "--model", "dummy:tiny", "--device", wrong])
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith(f"tern: device is '{wrong}'")
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--url", "http://127.0.0.1:9", "--device", "cpu"])
    assert ended.value.code == 2
    assert "--device" in capsys.readouterr().err


def test_a_full_gpu_is_said_to_be_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: torch.device, __: int) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    class Card:
        name, major, minor, total_memory = "Some GPU", 9, 0, 80_000_000_000

    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: Card)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (2_000_000_000, 80_000_000_000))
    monkeypatch.setattr("tern.bench.gpu.copy_rate", full)
    with pytest.raises(OptionError, match=r"cuda:1 has 2\.0 GB free, and measuring its limits takes 8\.6"):
        measure_gpu(torch.device("cuda:1"))


def test_an_older_gpu_is_asked_for_no_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        name, major, minor, total_memory = "Some GPU", 8, 0, 80_000_000_000

    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: Card)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda _: None)
    for name, rate in (("copy_rate", 2e12), ("product_rate", 3e14), ("fp8_product_rate", 6e14)):
        monkeypatch.setattr(f"tern.bench.gpu.{name}", lambda *_, rate=rate: rate)
    assert measure_gpu(torch.device("cuda:0")) == GpuLimits("Some GPU", 80.0, 2000.0, 300.0, None)
    Card.minor = 9
    assert measure_gpu(torch.device("cuda:0")) == GpuLimits("Some GPU", 80.0, 2000.0, 300.0, 600.0)


def test_a_report_names_the_gpu(tmp_path: Path) -> None:
    setting = Setting(
        "tern bench --device cuda", "2026-11-24 10:00 UTC", "Some Processor", 24.0, "0.1", "3.12", "Some GPU"
    )
    results = [BenchResult("decode", 1, 1, 0, 300.0, 0.5)]
    report = BenchReport("ernie", "fp8", setting, CARD, results, 1.0, 12.0, 50.0)
    assert report.as_json()["machine"]["copy_gb_s"] == 1000.0
    assert report.as_json()["setting"]["gpu"] == "Some GPU"
    Destination.of(str(tmp_path / "a.svg")).write(lambda: steps_figure(report), report.as_json())
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "Some GPU, moves 1000 GB/s, 200 bf16 TFLOP/s, 400 fp8" in text
    assert "measured on Some GPU in a machine with Some Processor, 24 GB" in text


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_s_limits_are_of_this_world() -> None:
    limits = measure_device(take_device("cuda"))
    assert isinstance(limits, GpuLimits)
    assert 100 < limits.copy_gb_s < 20_000
    assert 10 < limits.bf16_tflops < 5_000
    assert limits.fp8_tflops is None or limits.bf16_tflops < limits.fp8_tflops < 10_000


@pytest.mark.gpu
@needs_gpu
def test_steps_on_a_gpu_are_timed_in_the_engine() -> None:
    source = resolve_model("dummy:tiny")
    report = run_bench(source, quantization=None, prefill=[64], decode=[1, 3], depths=[0, 100], device="cuda")
    assert report.setting.gpu == report.as_json()["machine"]["name"] == torch.cuda.get_device_name()
    assert [result.kind for result in report.results] == ["prefill", "decode", "decode"] * 2
    assert all(0 < result.limit_share < 1 and result.overhead_share is None for result in report.results)
    assert report.peak_gpu_gb is not None
    assert report.peak_gpu_gb > 0


def test_on_the_cpu_the_network_keeps_its_own_time() -> None:
    source = resolve_model("dummy:tiny")
    bench = Bench(source.config, load_tensors(source, quantization="wint4"), 40)
    assert bench.timed is bench.model
    assert not bench.model.skips_prompts
    assert bench.batch(1, 4, 2).token_ids.device == CPU


def test_without_a_clock_in_the_network_the_engine_s_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: one second a step by the clock; the first four prepare."""
    source = resolve_model("dummy:tiny")
    bench = Bench(source.config, load_tensors(source, quantization="wint4"), 2 * (40 + 17), 2)
    bench.timed = None
    clock, steps, step = itertools.count(), itertools.count(), bench.engine.step
    monkeypatch.setattr(bench.engine, "step", lambda: (next(steps), step())[1])
    monkeypatch.setattr("tern.bench.overhead.time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(bench, "model", SkippingModel(source.config, bench.tensors))
    bench.engine.runner.model = bench.model
    result = bench.decode(2, 40, CARD)
    assert next(steps) == 1 + 3 + 15
    assert (result.tokens_per_s, result.overhead_share) == (2.0, None)
    assert result.limit_share == bench.work(2, 1, 40).seconds(CARD)
    assert not bench.engine.has_work
    bench.engine.check_integrity()
