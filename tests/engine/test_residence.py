"""Where a network goes: decided from bytes, and said in words."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tern.checkpoint import PRESETS, resolve_model
from tern.engine import Engine, EngineOptions, residence
from tern.engine.residence import RUNNING_BYTES, WeightSizes, choose_packing, choose_residence, resolve_residence
from tern.errors import OptionError

ERNIE = "dummy:ernie-4.5-21b-a3b"


def sizes(quantization: str | None = None) -> WeightSizes:
    return WeightSizes.of(resolve_model(ERNIE), torch.bfloat16, quantization)


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
    ("quantization", "gpu", "host", "kind", "split", "words"),
    [
        (None, 140e9, 10e9, "cuda", None, "The weights take 43.7 GB of the 138.5 GB that the GPU has for weights."),
        (None, 24e9, 64e9, "split", "wint8", "more than the 22.5 GB .* 20.4 GB as wint8"),
        (None, 24e9, 16e9, "split", "wint4", "10.5 GB as wint4"),
        (None, 4e9, 64e9, "cpu", None, "fit into the host's memory"),
        ("fp8", 16e9, 24e9, "split", "wint8", "The weights take 22"),
        ("wint4", 16e9, 4e9, "cuda", None, "of the 14.5 GB"),
        ("wint4", 8e9, 16e9, "split", "wint4", "as wint4"),
        ("none", 24e9, 64e9, "cpu", None, "fit into the host's memory"),
    ],
)
def test_what_is_chosen(
    quantization: str | None, gpu: float, host: float, kind: str, split: str | None, words: str
) -> None:
    chosen = choose_residence(sizes(quantization), int(gpu), int(host))
    assert (chosen.kind, chosen.split) == (kind, split)
    assert re.search(words, chosen.reason), chosen.reason


def test_the_limits_are_exact() -> None:
    each = WeightSizes(100, 100, {"wint8": (10, 50), "wint4": (10, 25)})
    cases: list[tuple[int, int, Any]] = [
        (100, 0, ("cuda", None)),
        (99, 50, ("split", "wint8")),
        (99, 49, ("split", "wint4")),
        (9, 100, ("cpu", None)),
    ]
    for gpu, host, expected in cases:
        chosen = choose_residence(each, gpu + RUNNING_BYTES, host + RUNNING_BYTES)
        assert (chosen.kind, chosen.split) == expected
    with pytest.raises(OptionError, match=r"more than .* choose a quantization of fewer bits, such as wint4"):
        choose_residence(each, 9 + RUNNING_BYTES, 99 + RUNNING_BYTES)
    assert choose_packing(each, 50 + RUNNING_BYTES) == "wint8"
    assert choose_packing(each, 49 + RUNNING_BYTES) == "wint4"
    with pytest.raises(OptionError, match=r"the routed experts take 0\.0 GB as wint4 and the host has"):
        choose_packing(each, 0)


def test_the_options_decide_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda": 24e9, "cpu": 64e9}
    monkeypatch.setattr(residence, "free_memory", lambda device: int(free[device.type]))
    source = resolve_model(ERNIE)

    def resolved(name: str, device: str, **options: Any) -> tuple[str, str | None]:
        chosen, split = resolve_residence(EngineOptions(device=name, **options), source, None, torch.device(device))
        return str(chosen), split

    assert resolved("auto", "cpu") == ("cpu", None)
    assert resolved("auto", "cuda") == ("cuda", "wint8")
    assert resolved("auto", "cuda", quantization="wint4") == ("cuda", None)
    assert resolved("cuda:1", "cuda:1") == ("cuda:1", None)
    assert resolved("split:1", "cuda:1", quantization="wint4") == ("cuda:1", "wint4")
    free["cuda"] = 2e9
    assert resolved("auto", "cuda") == ("cpu", None)
    with pytest.raises(OptionError, match="no routed experts that could be packed on the CPU"):
        resolved("split", "cuda", quantization="none")


def test_a_split_needs_a_gpu_and_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(OptionError, match=r"device is 'split', but this torch .* was built without CUDA"):
        Engine.open(resolve_model("dummy:tiny"), EngineOptions(device="split"))
    monkeypatch.setitem(PRESETS, "dense", {**PRESETS["tiny"], "model_type": "ernie4_5"})
    with pytest.raises(OptionError, match="a dense network"):
        choose_packing(WeightSizes.of(resolve_model("dummy:dense"), torch.bfloat16, None), 10**12)
