"""Synthetic weights: reproducible, of the right types, and a network that computes sensible numbers."""

from __future__ import annotations

import math

import pytest
import torch
from test_layouts import logits

from tern.checkpoint import PRESETS, load_model, load_tensors, resolve_model
from tern.checkpoint import synthetic as synthetic_module
from tern.model import ErnieConfig, parameter_shapes


def test_same_seed_same_weights_whatever_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_module, "BLOCK", 1000)
    threads = torch.get_num_threads()
    first = load_tensors(resolve_model("dummy:tiny?seed=3"))
    torch.set_num_threads(3)
    try:
        again = load_tensors(resolve_model("dummy:tiny?seed=3"))
    finally:
        torch.set_num_threads(threads)
    other = load_tensors(resolve_model("dummy:tiny?seed=4"))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        assert torch.equal(tensor, other[name]) == name.endswith("norm"), name


def test_tensors_and_blocks_differ_from_each_other() -> None:
    tensors = load_tensors(resolve_model("dummy:tiny"))
    assert not torch.equal(tensors["layers.1.moe.down"], tensors["layers.2.moe.down"])
    experts = tensors["layers.1.moe.gate_up"]
    assert not torch.equal(experts[0], experts[1])


def test_shapes_and_types_are_the_network_s_own() -> None:
    source = resolve_model("dummy:tiny")
    for dtype in (torch.bfloat16, torch.float32):
        tensors = load_tensors(source, dtype=dtype)
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == parameter_shapes(source.config)
        for name, tensor in tensors.items():
            assert tensor.dtype == (torch.float32 if name.endswith(("router", "correction_bias")) else dtype)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.bfloat16),
        ({}, torch.float32),
        ({"num_hidden_layers": 24}, torch.float32),
        ({"model_type": "ernie4_5"}, torch.float32),
        ({"tie_word_embeddings": False, "use_bias": True}, torch.float32),
    ],
    ids=["bf16", "tiny", "deep", "dense", "head and biases"],
)
def test_activations_stay_finite_and_logits_mean_something(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], dtype: torch.dtype
) -> None:
    monkeypatch.setitem(PRESETS, "tried", {**PRESETS["tiny"], **changes})
    found = logits(load_model(resolve_model("dummy:tried"), dtype=dtype), list(range(1, 60)))
    assert torch.isfinite(found).all()
    assert 0.3 < found.std() < 3.0
    entropy = -(found.softmax(-1) * found.log_softmax(-1)).sum(-1)
    assert (entropy > 0.5 * math.log(found.shape[1])).all(), "no token takes everything"
    assert len(found.argmax(-1).unique()) > 30, "what comes next depends on what came before"


def test_correction_bias_changes_some_choices_of_experts_and_not_all() -> None:
    tensors = load_tensors(resolve_model("dummy:tiny"))
    rows = torch.randn(500, 128, generator=torch.Generator().manual_seed(1))
    probabilities = (rows @ tensors["layers.1.moe.router"].t()).softmax(-1)
    biased = probabilities + tensors["layers.1.moe.correction_bias"]
    changed = probabilities.topk(4).indices.sort().values != biased.topk(4).indices.sort().values
    assert 0.02 < changed.any(-1).float().mean() < 0.9


def test_presets_have_the_sizes_of_their_names() -> None:
    def parameters(preset: str) -> float:
        shapes = parameter_shapes(ErnieConfig.from_dict(PRESETS[preset]))
        return sum(math.prod(shape) for shape in shapes.values()) / 1e9

    assert parameters("ernie-4.5-21b-a3b") == pytest.approx(21.83, abs=0.005)
    assert parameters("ernie-4.5-0.3b") == pytest.approx(0.36, abs=0.01)
    assert parameters("ernie-4.5-300b-a47b") == pytest.approx(300, abs=1.5)
