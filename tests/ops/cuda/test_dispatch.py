"""What lies on a GPU goes to its kernels through `tern.ops`, whatever the kind of weight."""

from __future__ import annotations

import pytest
import torch

from tern import ops
from tern.ops import reference_gpu
from tern.ops.placement import interpreted
from tests.compare import assert_close
from tests.ops.cuda.test_experts import EXPERTS, choices, moved, stacks
from tests.ops.cuda.test_matmul import KINDS, noise


@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_layers(kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, down, shared = stacks(kind, 40, 24)
    weights, experts = choices(3, 2)
    x, bias = noise(3, 40), noise(48, seed=8)
    expected = (
        reference_gpu.linear(x, gate_up[1], bias),
        reference_gpu.swiglu(x, shared),
        reference_gpu.mix_experts(x, weights, experts, gate_up, down, shared),
    )
    called = []
    for name in ("linear", "swiglu", "mix_experts"):
        monkeypatch.setattr(f"tern.ops.cuda.{name}", _noted(name, called))
    here = tuple(tensor.to(device) for tensor in (x, weights, experts, gate_up, down, bias))

    def compute() -> tuple[torch.Tensor, ...]:
        x, weights, experts, gate_up, down, bias = here
        there = moved(shared, device)
        return (
            ops.linear(x, gate_up[1], bias),
            ops.swiglu(x, there),
            rows_of(ops.mix_experts(x, weights, experts, gate_up, down, there)),
        )

    with interpreted():
        found = compute()
    assert called == ["linear", "swiglu", "mix_experts"]
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual.cpu(), wanted, tolerance=2e-2 if kind.startswith("fp8") else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_processor_computes_them_in_plain_torch(kind: str) -> None:
    gate_up, down, shared = stacks(kind, 40, 24)
    weights, experts = choices(3, 2)
    x = noise(3, 40)
    expected = reference_gpu.mix_experts(x, weights, experts, gate_up, down, shared)
    assert torch.equal(ops.mix_experts(x, weights, experts, gate_up, down, shared), expected)
    assert torch.equal(ops.linear(x, gate_up[1]), reference_gpu.linear(x, gate_up[1]))
    assert torch.equal(ops.swiglu(x, shared), reference_gpu.swiglu(x, shared))


def test_a_mixture(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, down, shared = stacks("int8", 40, 24)
    x, router = noise(3, 40), ops.Router(noise(EXPERTS, 40, seed=6), torch.zeros(EXPERTS), 2, 1e-12)
    expected = ops.mixture(x, router, gate_up, down, shared)
    chosen = ops.route(x, router.weight, router.correction_bias, 2, 1e-12)
    assert torch.equal(expected, ops.mix_experts(x, *chosen, gate_up, down, shared))
    called: list[str] = []
    monkeypatch.setattr("tern.ops.cuda.mixture", _noted("mixture", called))
    there = ops.Router(router.weight.to(device), router.correction_bias.to(device), 2, 1e-12)
    with interpreted():
        found = ops.mixture(x.to(device), there, gate_up.to(device), down.to(device), moved(shared, device))
    assert called == ["mixture"]
    assert_close(rows_of(found).cpu(), expected, tolerance=1e-5)


def rows_of(delta: ops.Delta) -> torch.Tensor:
    """A GPU's kernels leave the sum to the next norm."""
    assert isinstance(delta, ops.ExpertOutputs)
    return delta.sum()


def _noted(name: str, called: list[str]):
    """The kernels' function, which also writes its name down."""
    from tern.ops import cuda

    function = getattr(cuda, name)

    def noted(*args: object) -> torch.Tensor:
        called.append(name)
        return function(*args)

    return noted
