"""Where a network goes: decided from bytes, and said in words."""

from __future__ import annotations

import re
import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_device import GB, Cards

from tern.checkpoint import PRESETS, resolve_model
from tern.engine import Engine, EngineOptions, fits
from tern.engine.cache_size import GpuMemory, token_bytes
from tern.engine.fits import CacheNeed, Room, WeightSizes, does_not_fit, runs_on, step_bytes
from tern.engine.residence import choose_packing, choose_residence, resolve_residence
from tern.errors import OptionError

ERNIE = "dummy:ernie-4.5-21b-a3b"
SOURCE = resolve_model(ERNIE)
GPU = torch.device("cuda:0")


def sizes(quantization: str | None = None) -> WeightSizes:
    return WeightSizes.of(SOURCE, torch.bfloat16, quantization)


def rooms(gpu: float, host: float, **options: Any) -> tuple[Room, Room]:
    """A GPU that is free, and a host, of so many bytes."""
    running = 10**9
    share = EngineOptions(**options).gpu_memory_utilization
    return Room(GpuMemory(int(gpu), int(gpu), running), running, share), Room(int(host), running)


def test_the_sizes_are_those_of_the_model() -> None:
    found = sizes()
    assert found.on_gpu == found.on_cpu
    assert 43.6e9 < found.on_gpu < 43.8e9
    assert list(found.split) == ["wint8", "wint4"]
    for packing, (beside, experts) in found.split.items():
        assert 2.8e9 < beside < 3.2e9
        assert experts == pytest.approx(20.4e9 * {"wint8": 1, "wint4": 4.125 / 8}[packing], rel=0.01)
    assert sizes("fp8").on_cpu is None
    assert list(sizes("fp8").split) == ["wint8"]
    assert list(sizes("wint4").split) == ["wint4"]
    assert not sizes("none").split
    assert sizes("wint4").split["wint4"][0] < 1.5e9


@pytest.mark.parametrize(
    ("quantization", "tokens", "gpu", "host", "kind", "split", "words"),
    [
        (
            None,
            None,
            140e9,
            10e9,
            "cuda",
            None,
            "43.7 GB and the cache of 131072 tokens 7.5 GB of the 125.0 GB",
        ),
        (None, None, 24e9, 64e9, "split", "wint8", "more than the 20.6 GB .* 20.4 GB as wint8.$"),
        (None, None, 24e9, 16e9, "split", "wint4", "10.5 GB as wint4"),
        (None, None, 4e9, 64e9, "cpu", None, "fit into the host's memory"),
        (
            None,
            None,
            12e9,
            64e9,
            "cpu",
            None,
            "max_model_len up to 120... only the routed experts would lie in",
        ),
        ("fp8", None, 16e9, 24e9, "split", "wint8", "The weights take 22"),
        ("wint4", None, 24e9, 4e9, "cuda", None, "of the 20.6 GB"),
        ("wint4", 131072, 16e9, 16e9, "split", "wint4", "With max_model_len up to .* they would lie there whole"),
        ("wint4", 16384, 18e9, 16e9, "cuda", None, "16384 tokens 0.9 GB of the 15.2 GB"),
        ("wint4", None, 8e9, 24e9, "cpu", None, "only the routed experts"),
        ("none", None, 24e9, 64e9, "cpu", None, "fit into the host's memory"),
    ],
)
def test_what_is_chosen(
    quantization: str | None, tokens: int | None, gpu: float, host: float, kind: str, split: str | None, words: str
) -> None:
    need = CacheNeed.of(SOURCE, EngineOptions(max_model_len=tokens), torch.bfloat16)
    chosen = choose_residence(sizes(quantization), need, *rooms(gpu, host))
    assert (chosen.kind, chosen.split) == (kind, split)
    assert re.search(words, chosen.reason), chosen.reason


def test_the_limits_are_exact() -> None:
    each, need = WeightSizes(100, 100, {"wint8": (10, 50), "wint4": (10, 25)}), CacheNeed(4, 5.0, 1, 20)

    def gpu(size: int) -> Room:
        return Room(GpuMemory(size + 7, size + 7, 7), 7, 1.0)

    def host(size: int) -> Room:
        return Room(size + 7, 7)

    cases: list[tuple[int, int, Any]] = [
        (120, 0, ("cuda", None)),
        (119, 50, ("split", "wint8")),
        (119, 49, ("split", "wint4")),
        (29, 120, ("cpu", None)),
    ]
    for on_gpu, on_host, expected in cases:
        chosen = choose_residence(each, need, gpu(on_gpu), host(on_host))
        assert (chosen.kind, chosen.split) == expected
    with pytest.raises(OptionError, match=r"more than .* choose a quantization of fewer bits, such as wint4"):
        choose_residence(each, need, gpu(29), host(119))
    assert choose_packing(each, host(50)) == "wint8"
    assert choose_packing(each, host(49)) == "wint4"
    with pytest.raises(OptionError, match=r"the routed experts take 0\.0 GB as wint4 and the host has"):
        choose_packing(each, host(0))


class Machine:
    """An L4 of `gpu` GB and a host with `host` GB free."""

    def __init__(
        self, patch: pytest.MonkeyPatch, gpu: float, host: float, capability: tuple[int, int] = (8, 9)
    ) -> None:
        Cards(patch, *[("NVIDIA L4", capability, gpu, gpu)] * 2)
        patch.setattr(fits, "free_memory", lambda _: int(host * GB))


def resolved(name: str, device: str, **options: Any) -> tuple[str, str | None]:
    chosen, split = resolve_residence(EngineOptions(device=name, **options), SOURCE, torch.device(device))
    return str(chosen), split


def test_the_options_decide_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, 24, 64, (8, 9))
    assert resolved("auto", "cpu") == ("cpu", None)
    assert resolved("auto", "cuda") == ("cuda", "wint8")
    assert resolved("auto", "cuda", quantization="wint4") == ("cuda", None)
    assert resolved("cuda:1", "cuda:1", quantization="wint4") == ("cuda:1", None)
    assert resolved("split:1", "cuda:1", quantization="wint4") == ("cuda:1", "wint4")
    with pytest.raises(OptionError, match="no routed experts that could be packed on the CPU"):
        resolved("split", "cuda", quantization="none")
    Machine(monkeypatch, 2, 64, (8, 9))
    assert resolved("auto", "cuda") == ("cpu", None)


FITS: list[tuple[float, dict[str, Any], str | None]] = [
    (80, {}, None),
    (48, {}, "its weights are 43.7 GB in bfloat16, .*What fits: quantization fp8 on cuda:0 .22.4 GB.; "),
    (32, {"quantization": "fp8"}, r"up to (\d+), or 131072 with kv_cache_dtype fp8"),
    (32, {"quantization": "fp8", "kv_cache_dtype": "fp8"}, None),
    (32, {"quantization": "wint8", "max_model_len": 65536}, None),
    (16, {"quantization": "wint4"}, r"quantization wint4 on cuda:0 \(12.3 GB\) with max_model_len up to (\d+)"),
    (16, {"quantization": "wint4", "max_model_len": 8192}, None),
    (16, {"quantization": "wint4", "max_model_len": 8192, "max_num_batched_tokens": 65536}, "65536 tokens take about"),
    (16, {"quantization": "wint4", "max_model_len": 8192, "kv_cache_memory": 2 * GB}, None),
    (16, {"quantization": "wint4", "max_model_len": 8192, "kv_cache_memory": 4 * GB}, "the cache that the options ask"),
    (16, {"quantization": "wint4", "kv_cache_memory": GB}, "needs 8192 cache blocks .* but kv_cache_memory gives"),
    (16, {"device": "split"}, None),
    (
        8,
        {"device": "split"},
        "weights without routed experts are 2.9 GB .*device split .* with max_model_len up to",
    ),
]


@pytest.mark.parametrize(("gpu", "options", "said"), FITS, ids=str)
def test_an_explicit_gpu_is_checked_in_every_form(
    gpu: float, options: dict[str, Any], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch, gpu, 64, (8, 9))
    given = {"device": "cuda", **options}
    if said is None:
        resolve_residence(EngineOptions(**given), SOURCE, GPU)
        return
    with pytest.raises(OptionError, match=said) as refused:
        resolve_residence(EngineOptions(**given), SOURCE, GPU)
    offered = re.search(said, str(refused.value))
    if offered is not None and offered.groups():  # what is said to fit does, and no more
        length = int(offered[1])
        resolve_residence(EngineOptions(**given, max_model_len=length), SOURCE, GPU)
        with pytest.raises(OptionError, match="does not fit on cuda:0"):
            resolve_residence(EngineOptions(**given, max_model_len=length + 1), SOURCE, GPU)


def test_what_cannot_be_computed_there_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, 32, 4, (8, 0))
    assert not runs_on("fp8", GPU)
    said = str(does_not_fit(SOURCE, EngineOptions(device="cuda"), torch.bfloat16, GPU))
    assert "fp8" not in said
    assert "device" not in said.partition("What fits")[2], "neither the processor nor a split has the memory"
    Machine(monkeypatch, 1, 1, (8, 9))
    assert "Nothing here has memory enough" in str(does_not_fit(SOURCE, EngineOptions(), torch.bfloat16, GPU))


def test_nothing_is_read_for_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, 24, 64, (8, 9))
    monkeypatch.setattr("tern.engine.engine.load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(OptionError, match="What fits: quantization wint4 on cuda:0"):
        Engine.open(SOURCE, EngineOptions(device="cuda", quantization="wint8"))


def test_what_was_loaded_lets_go_before_the_rest_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, 80, 64, (8, 9))
    loaded: list[weakref.ref[torch.Tensor]] = []

    def load(*_: Any, **__: Any) -> None:
        tensor = torch.zeros(3)
        loaded.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def emptied(_: torch.device) -> None:
        assert [each() for each in loaded] == [None]

    monkeypatch.setattr("tern.engine.engine.load_model", load)
    monkeypatch.setattr("tern.engine.engine.free_unused_memory", emptied)
    monkeypatch.setattr("tern.engine.engine.current", lambda _: nullcontext())
    with pytest.raises(OptionError, match="does not fit on cuda:0"):
        Engine.open(SOURCE, EngineOptions(device="cuda"))


def test_a_predictor_has_a_layer_of_cache_too() -> None:
    config = replace(SOURCE.config, num_nextn_predict_layers=1)
    source = replace(SOURCE, config=config)
    plain, twice = (
        CacheNeed.of(source, EngineOptions(speculation=speculation), torch.bfloat16) for speculation in ("off", "auto")
    )
    assert plain.size == 131072 * token_bytes(config, torch.bfloat16)
    assert twice.size == plain.size // 28 * 29


def test_a_step_grows_with_what_it_may_hold() -> None:
    small, long, many = (
        step_bytes(SOURCE.config, EngineOptions(**each))
        for each in ({}, {"max_num_batched_tokens": 16384}, {"max_num_seqs": 256})
    )
    assert 0.2e9 < small < 0.4e9
    assert 1e9 < long < 3e9
    assert 0.6e9 < many < 1e9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_what_is_counted_beforehand_is_near_what_is_measured() -> None:
    options = EngineOptions(device="cuda", dtype="bfloat16", max_model_len=4096)
    source = resolve_model(None)
    expected = Room.of(GPU, options, source.config).for_cache(WeightSizes.of(source, torch.bfloat16, None).on_gpu)
    engine = Engine.open(source, options, progress=False)
    tokens = engine.pool.num_blocks * options.block_size
    found = tokens * CacheNeed.of(source, options, torch.bfloat16).token_size
    assert found == pytest.approx(expected, abs=1.5e9)


def test_a_split_needs_a_gpu_and_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(OptionError, match=r"device is 'split', but this torch .* was built without CUDA"):
        Engine.open(resolve_model("dummy:tiny"), EngineOptions(device="split"))
    monkeypatch.setitem(PRESETS, "dense", {**PRESETS["tiny"], "model_type": "ernie4_5"})
    with pytest.raises(OptionError, match="a dense network"):
        choose_packing(WeightSizes.of(resolve_model("dummy:dense"), torch.bfloat16, None), 10**12)
