"""Mixtures of experts of the GPU's kernels beside the reference."""

from __future__ import annotations

import math

import pytest
import torch

from tern.ops import Router, SwiGLUWeights, reference, reference_gpu
from tern.ops.cuda import mix_experts, mixture, products
from tern.ops.cuda.experts import sort_by_expert
from tern.ops.gpu_weights import GpuWeight
from tests.compare import assert_close
from tests.ops.cuda.test_matmul import KINDS, noise, weight_of

EXPERTS = 7
# What enters `down` may round to a neighbour: in bfloat16, in fp8.
TOLERANCES = {"plain": 1e-5, "int8": 1e-5, "int4": 1e-5, "fp8-blocks": 2e-2, "fp8-whole": 2e-2}


def choices(tokens: int, per_token: int, *, only: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and experts of tokens; none but expert 3 is never chosen, or all choose `only`."""
    scores = noise(tokens, EXPERTS, seed=5)
    scores[:, 3] = -math.inf
    if only is not None:
        scores[:, only] = math.inf
    experts = scores.topk(per_token, dim=-1).indices
    return torch.rand(tokens, per_token, generator=torch.Generator().manual_seed(6)), experts


def stacks(kind: str, hidden: int, width: int) -> tuple[GpuWeight, GpuWeight, SwiGLUWeights]:
    """gate_up, down and the shared expert."""
    shared = weight_of(kind, 4 * width, hidden, seed=3, parts=2), weight_of(kind, hidden, 2 * width, seed=4)
    gate_up = weight_of(kind, EXPERTS, 2 * width, hidden, parts=2)
    return gate_up, weight_of(kind, EXPERTS, hidden, width, seed=2), SwiGLUWeights(*shared)


def moved(layer: SwiGLUWeights, device: torch.device) -> SwiGLUWeights:
    return SwiGLUWeights(layer.gate_up.to(device), layer.down.to(device))


@pytest.mark.parametrize("kind", ["plain", *KINDS])
@pytest.mark.parametrize(
    ("tokens", "per_token", "only"), [(0, 2, None), (1, 6, None), (3, 1, None), (17, 2, None), (20, 1, 6)]
)
def test_mix_experts(kind: str, tokens: int, per_token: int, only: int | None, device: torch.device) -> None:
    gate_up, down, shared = stacks(kind, 136, 72)
    weights, experts = choices(tokens, per_token, only=only)
    x = noise(tokens, 136)
    with_shared = shared if tokens != 3 else None
    expected = reference_gpu.mix_experts(x, weights, experts, gate_up, down, with_shared)
    there = [tensor.to(device) for tensor in (x, weights, experts, gate_up, down)]
    found = mix_experts(*there, None if with_shared is None else moved(shared, device)).sum()
    assert_close(found.cpu(), expected, tolerance=TOLERANCES[kind])


@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_bfloat16(kind: str, device: torch.device) -> None:
    gate_up, down, shared = stacks(kind, 128, 70)
    if kind == "plain":
        gate_up, down = gate_up.bfloat16(), down.bfloat16()
        shared = SwiGLUWeights(shared.gate_up.bfloat16(), shared.down.bfloat16())
    weights, experts = choices(9, 3)
    x = noise(9, 128).bfloat16()
    expected = reference_gpu.mix_experts(x, weights, experts, gate_up, down, shared)
    there = [tensor.to(device) for tensor in (x, weights, experts, gate_up, down)]
    assert_close(mix_experts(*there, moved(shared, device)).sum().cpu(), expected, tolerance=1.5e-2)


def test_the_reference_for_a_gpu_is_the_reference() -> None:
    gate_up, down, shared = stacks("plain", 40, 24)
    weights, experts = choices(5, 2)
    x = noise(5, 40)
    expected = reference.mix_experts(x, weights, experts, gate_up, down, shared)
    assert_close(reference_gpu.mix_experts(x, weights, experts, gate_up, down, shared), expected, tolerance=1e-6)


@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_a_token_is_the_same_in_any_batch(kind: str, device: torch.device) -> None:
    gate_up, down, shared = (
        stack.to(device) if not isinstance(stack, SwiGLUWeights) else moved(stack, device)
        for stack in stacks(kind, 40, 24)
    )
    weights, experts = (tensor.to(device) for tensor in choices(60, 2))
    x = noise(60, 40).to(device)
    if kind == "plain":
        gate_up, down = gate_up.bfloat16(), down.bfloat16()
        shared = SwiGLUWeights(shared.gate_up.bfloat16(), shared.down.bfloat16())
    x = x.bfloat16()
    whole = mix_experts(x, weights, experts, gate_up, down, shared).sum()
    for rows in (slice(0, 1), slice(7, 8), slice(3, 20)):
        alone = mix_experts(x[rows], weights[rows], experts[rows], gate_up, down, shared).sum()
        assert torch.equal(alone, whole[rows])


@pytest.mark.parametrize("tokens", [0, 1, 5, 700])
def test_sorting_by_expert(tokens: int, device: torch.device) -> None:
    _, experts = choices(tokens, 4)
    routing = sort_by_expert(experts.to(device), EXPERTS)
    counts = torch.bincount(experts.flatten(), minlength=EXPERTS)
    assert routing.starts.tolist() == [0, *counts.cumsum(0).tolist()]
    assert routing.order.tolist() == experts.flatten().argsort(stable=True).tolist()


@pytest.mark.parametrize("kind", ["plain", *KINDS])
@pytest.mark.parametrize(("hidden", "width", "wide"), [(40, 24, 1), (128, 128, 70), (130, 33, 300)])
def test_a_shared_expert_of_any_width(kind: str, hidden: int, width: int, wide: int, device: torch.device) -> None:
    gate_up, down, _ = stacks(kind, hidden, width)
    shared = SwiGLUWeights(weight_of(kind, 2 * wide, hidden, seed=3, parts=2), weight_of(kind, hidden, wide, seed=4))
    for tokens in (0, 1, 19):
        weights, experts = choices(tokens, 3)
        x = noise(tokens, hidden)
        expected = reference_gpu.mix_experts(x, weights, experts, gate_up, down, shared)
        there = [tensor.to(device) for tensor in (x, weights, experts, gate_up, down)]
        assert_close(mix_experts(*there, moved(shared, device)).sum().cpu(), expected, tolerance=TOLERANCES[kind])


def test_a_shared_expert_of_another_kind_or_with_biases(device: torch.device) -> None:
    gate_up, down, shared = stacks("int8", 40, 24)
    others = [
        stacks("plain", 40, 24)[2],
        SwiGLUWeights(shared.gate_up, stacks("int4", 40, 24)[2].down),
        SwiGLUWeights(shared.gate_up, shared.down, noise(96, seed=8), noise(40, seed=9)),
    ]
    weights, experts = choices(5, 2)
    x = noise(5, 40)
    there = [tensor.to(device) for tensor in (x, weights, experts, gate_up, down)]
    for other in others:
        expected = reference_gpu.mix_experts(x, weights, experts, gate_up, down, other)
        biases = (None if bias is None else bias.to(device) for bias in (other.gate_up_bias, other.down_bias))
        found = mix_experts(*there, SwiGLUWeights(other.gate_up.to(device), other.down.to(device), *biases)).sum()
        assert_close(found.cpu(), expected, tolerance=TOLERANCES["int8"])


def test_block_wise_beside_whole_scales(device: torch.device) -> None:
    gate_up, down, _ = stacks("fp8-blocks", 260, 130)
    shared = stacks("fp8-whole", 260, 130)[2]
    weights, experts = choices(5, 2)
    x = noise(5, 260)
    expected = reference_gpu.mix_experts(x, weights, experts, gate_up, down, shared)
    there = [tensor.to(device) for tensor in (x, weights, experts, gate_up, down)]
    assert_close(mix_experts(*there, moved(shared, device)).sum().cpu(), expected, tolerance=TOLERANCES["fp8-whole"])


def test_what_does_not_fit_beside_is_refused(device: torch.device) -> None:
    gate_up, _, shared = stacks("int8", 40, 24)
    x = noise(3, 40).to(device)
    routing = sort_by_expert(choices(3, 2)[1].to(device), EXPERTS)
    for rows, weight in ((x[:, :39], shared.gate_up), (x, stacks("int4", 40, 24)[2].gate_up)):
        beside = products.Beside(rows, weight.to(device), x.new_empty(3, 48))
        with pytest.raises(ValueError, match="beside experts of int8"):
            products.multiply(x, gate_up.to(device), gated=True, routing=routing, beside=beside)


@pytest.mark.parametrize("kind", ["plain", "int4"])
def test_a_mixture(kind: str, device: torch.device) -> None:
    gate_up, down, shared = stacks(kind, 40, 24)
    router = Router(noise(EXPERTS, 40, seed=6), noise(EXPERTS, seed=7) / 100, 3, 1e-12)
    there = Router(router.weight.to(device), router.correction_bias.to(device), 3, 1e-12)
    for tokens in (0, 1, 33):
        x = noise(tokens, 40)
        chosen = reference.route(x, router.weight, router.correction_bias, 3, 1e-12)
        expected = reference_gpu.mix_experts(x, *chosen, gate_up, down, shared)
        tensors = (tensor.to(device) for tensor in (gate_up, down))
        found = mixture(x.to(device), there, *tensors, moved(shared, device)).sum()
        assert_close(found.cpu(), expected, tolerance=1e-5)


def test_a_nan_stays_with_its_token(device: torch.device) -> None:
    gate_up, down, _ = stacks("plain", 48, 24)
    weights, experts = choices(6, 2)
    x = noise(6, 48)
    x[2] = math.nan
    found = mix_experts(*(tensor.to(device) for tensor in (x, weights, experts, gate_up, down))).sum().cpu()
    assert found[2].isnan().all()
    assert torch.cat((found[:2], found[3:])).isfinite().all()
