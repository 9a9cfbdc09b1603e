"""Weights packed while they are loaded: which, how well they compute, and what is refused."""

from __future__ import annotations

import pytest
import torch
from test_layouts import logits

from tern import ops
from tern.checkpoint import PRESETS, load_model, load_tensors, resolve_model
from tern.checkpoint.quantisation import QUANTIZATIONS, pack_parameter
from tern.engine import EngineOptions
from tern.errors import CheckpointError, OptionError
from tern.model import parameter_shapes


def embedded(quantization: str | None) -> dict[str, ops.Weight]:
    return load_tensors(resolve_model(None), dtype=torch.float32, quantization=quantization)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_linear_weights_and_experts_are_packed_and_nothing_else(quantization: str) -> None:
    shapes = parameter_shapes(resolve_model(None).config)
    for name, weight in embedded(quantization).items():
        linear = name == "head" or name.endswith((".weight", "moe.gate_up", "moe.down"))
        assert isinstance(weight, ops.PackedWeight) == linear, name
        assert tuple(weight.shape) == shapes.get(name, shapes["embed"])
        if isinstance(weight, ops.PackedWeight):
            assert weight.bits == (8 if name == "head" else QUANTIZATIONS[quantization])


@pytest.mark.parametrize(("quantization", "limit"), [("wint8", 0.016), ("wint4", 0.115)])
def test_packed_weights_are_the_stored_ones_rounded(quantization: str, limit: float) -> None:
    plain = embedded(None)
    for name, weight in embedded(quantization).items():
        original = plain["embed" if name == "head" else name]
        assert isinstance(original, torch.Tensor)
        if isinstance(weight, ops.PackedWeight):
            assert (ops.unpack(weight) - original).norm() <= limit * original.norm(), name
        else:
            assert torch.equal(weight, original), name


@pytest.mark.parametrize(
    "changes", [{}, {"model_type": "ernie4_5"}, {"tie_word_embeddings": False, "use_bias": True}], ids=str
)
def test_a_packed_network_computes_what_its_unpacked_weights_would(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    monkeypatch.setitem(PRESETS, "tried", {**PRESETS["tiny"], **changes})
    source = resolve_model("dummy:tried")
    packed = load_tensors(source, dtype=torch.float32, quantization="wint8")
    plain = {name: ops.unpack(w) if isinstance(w, ops.PackedWeight) else w for name, w in packed.items()}
    tokens = list(range(1, 60))
    model = load_model(source, dtype=torch.float32)
    expected = logits(type(model)(source.config, plain), tokens)
    difference = logits(type(model)(source.config, packed), tokens) - expected
    assert difference.norm() < 0.1 * expected.norm()  # a random router sends a few tokens to other experts


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_synthetic_weights_are_drawn_packed_and_repeatable(quantization: str) -> None:
    first, again, other = (
        load_tensors(resolve_model(f"dummy:tiny?seed={seed}"), quantization=quantization) for seed in (1, 1, 2)
    )
    plain = load_tensors(resolve_model("dummy:tiny"))
    for name, weight in first.items():
        if not isinstance(weight, ops.PackedWeight):
            continue
        assert torch.equal(weight.values, again[name].values)
        assert not torch.equal(weight.values, other[name].values)
        unpacked, drawn = ops.unpack(weight), plain["embed" if name == "head" else name]
        assert unpacked.shape == drawn.shape
        assert 0.9 < unpacked.std() / drawn.float().std() < 1.1 or name == "head", name
        assert unpacked.mean().abs() < 0.05 * unpacked.std()


def test_what_cannot_be_packed_is_said() -> None:
    with pytest.raises(OptionError, match="quantization is 'wint2': it must be one of wint4, wint8"):
        load_tensors(resolve_model("dummy:tiny"), quantization="wint2")
    with pytest.raises(OptionError, match="packed weights run on CPUs and GPUs"):
        load_tensors(resolve_model("dummy:tiny"), quantization="wint4", device="meta")
    for name in ("fp8", "block_wise_fp8"):
        with pytest.raises(OptionError, match=f"quantization is '{name}', but the device is the CPU.*choose wint8"):
            load_tensors(resolve_model("dummy:tiny"), quantization=name)
    with pytest.raises(OptionError, match="quantization is 'int4'"):
        EngineOptions(quantization="int4")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_and_not_packed(value: float) -> None:
    weight = torch.ones(4, 16, 32)
    weight[2, 3, 5] = value
    with pytest.raises(CheckpointError, match=r"layers\.1\.moe\.down holds values that are not finite"):
        pack_parameter("layers.1.moe.down", weight, "wint4")
    assert pack_parameter("layers.1.attn_norm", weight[2, 3], "wint4") is not None
