"""Routed experts packed on the CPU beside a network elsewhere: the same sums, in the same order."""

from __future__ import annotations

import pytest
import torch

from tern import ops
from tern.ops import SwiGLUWeights, cpu, reference
from tests.compare import assert_close

HIDDEN, WIDTH, EXPERTS, CHOSEN = 64, 48, 6, 2


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stacks(bits: int) -> tuple[ops.PackedWeight, ops.PackedWeight]:
    gate_up = noise(EXPERTS, 2 * WIDTH, HIDDEN, seed=1) / HIDDEN**0.5
    return ops.pack(gate_up, bits, 2), ops.pack(noise(EXPERTS, HIDDEN, WIDTH, seed=2) / WIDTH**0.5, bits)


def shared_expert(dtype: torch.dtype, device: str = "cpu") -> SwiGLUWeights:
    weights = (noise(2 * WIDTH, HIDDEN, seed=3) / HIDDEN**0.5, noise(HIDDEN, WIDTH, seed=4) / WIDTH**0.5)
    return SwiGLUWeights(*(weight.to(device, dtype) for weight in weights))


def step(rows: int, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weights = noise(rows, CHOSEN, seed=5).softmax(dim=1)
    chosen = noise(rows, EXPERTS, seed=7).argsort(dim=1)[:, :CHOSEN].contiguous()
    return noise(rows, HIDDEN, seed=6).to(device, dtype), weights.to(device), chosen.to(device)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 3, 17])
def test_the_sum_is_that_of_both(rows: int, dtype: torch.dtype, bits: int) -> None:
    x, weights, chosen = step(rows, dtype)
    gate_up, down = stacks(bits)
    shared = shared_expert(dtype)
    wide = x.float() if dtype == torch.float16 else x
    routed = cpu.mix_experts_packed(wide, weights, chosen, gate_up, down).to(dtype)
    found = ops.mix_experts(x, weights, chosen, gate_up, down, shared)
    assert found.dtype == dtype
    assert torch.equal(found, routed + ops.swiglu(x, shared))
    floats = [ops.unpack(weight).to(dtype) for weight in (gate_up, down)]
    expected = reference.mix_experts(x, weights, chosen, floats[0], floats[1], shared)
    assert_close(found.float(), expected.float(), tolerance=0.03)


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    x, weights, chosen = step(9, torch.bfloat16)
    gate_up, down = stacks(4)
    shared = shared_expert(torch.bfloat16)
    whole = ops.mix_experts(x, weights, chosen, gate_up, down, shared)
    for row in range(9):
        rows = slice(row, row + 1)
        assert torch.equal(ops.mix_experts(x[rows], weights[rows], chosen[rows], gate_up, down, shared), whole[rows])


def test_without_a_shared_expert_there_is_nothing_to_add() -> None:
    x, weights, chosen = step(5, torch.float32)
    gate_up, down = stacks(8)
    assert torch.equal(
        ops.mix_experts(x, weights, chosen, gate_up, down), cpu.mix_experts_packed(x, weights, chosen, gate_up, down)
    )


def test_a_mixture_is_of_the_routers_choice() -> None:
    x, _, _ = step(5, torch.float32)
    router = ops.Router(noise(EXPERTS, HIDDEN, seed=8), torch.zeros(EXPERTS), CHOSEN, 1e-12)
    chosen = ops.route(x, router.weight, router.correction_bias, CHOSEN, 1e-12)
    given = (*stacks(8), shared_expert(torch.float32))
    assert torch.equal(ops.mixture(x, router, *given), ops.mix_experts(x, *chosen, *given))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("with_shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_beside_a_gpu(dtype: torch.dtype, with_shared: bool) -> None:
    gate_up, down = stacks(4)
    shared = shared_expert(dtype, "cuda") if with_shared else None
    on_gpu = ops.mix_experts(*step(33, dtype, "cuda"), gate_up, down, shared)
    assert on_gpu.device.type == "cuda"
    x, weights, chosen = step(33, dtype)
    wide = x.float() if dtype == torch.float16 else x
    routed = cpu.mix_experts_packed(wide, weights, chosen, gate_up, down).to(dtype)
    expected = routed + reference.swiglu(x, shared_expert(dtype)) if with_shared else routed
    assert_close(on_gpu.cpu().float(), expected.float(), tolerance=0.02)
