"""Each operation of `tern.ops.reference` against an independent computation in float64: other formulas or loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tern.ops import reference
from tests.compare import assert_close

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_rms_norm(tokens: int, eps: float) -> None:
    x, weight = noise(tokens, 33, scale=3.0), noise(33, seed=1)
    wide = x.double()
    expected = wide / (wide.pow(2).sum(-1, keepdim=True) / 33 + eps).sqrt() * weight.double()
    assert_close(reference.rms_norm(x, weight, eps), expected, tolerance=1e-6)


def test_rms_norm_of_zeros_is_zero() -> None:
    assert torch.equal(reference.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-5), torch.zeros(2, 8))


def test_add_rms_norm_returns_the_sum_as_the_new_residual() -> None:
    delta, residual, weight = noise(3, 16), noise(3, 16, seed=1), noise(16, seed=2)
    normed, summed = reference.add_rms_norm(delta, residual, weight, 1e-5)
    assert torch.equal(summed, delta + residual)
    assert torch.equal(normed, reference.rms_norm(summed, weight, 1e-5))
    first, untouched = reference.add_rms_norm(None, residual, weight, 1e-5)
    assert untouched is residual
    assert torch.equal(first, reference.rms_norm(residual, weight, 1e-5))


@pytest.mark.parametrize("head_dim", [2, 6, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rope_is_a_complex_rotation_of_interleaved_pairs(head_dim: int, theta: float) -> None:
    """Pairs (2j, 2j + 1) are complex numbers multiplied by exp(i position theta^(-2j/D))."""
    positions = torch.tensor([0, 1, 2, 63, 4095, 100_003, 131_071])
    x = noise(len(positions), 3, head_dim)
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    # Exact angles, while float32 rounds them: by up to 2^-8 at position 100 000, which is part of the trained model.
    angles = positions.double()[:, None] * frequencies
    pairs = torch.view_as_complex(x.double().view(*x.shape[:-1], -1, 2))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)
    actual = reference.apply_rotary(
        x, *reference.rotary_table(positions, reference.rotary_frequencies(head_dim, theta, CPU))
    )
    for row, position in enumerate(positions.tolist()):
        assert_close(actual[row], expected[row], tolerance=1e-6 + 2e-7 * position)


def test_rope_angles_are_float32_products_of_float32_frequencies() -> None:
    """Bit for bit what transformers computes, at positions where another rounding would give another angle."""
    positions = torch.tensor([99_999, 100_003, 131_071])
    inverse = 1.0 / (500000.0 ** (torch.arange(0, 128, 2, dtype=torch.float) / 128))
    angles = positions[:, None].float() * inverse
    cosines, sines = reference.rotary_table(positions, reference.rotary_frequencies(128, 500000.0, CPU))
    assert_close(cosines[:, 0::2], angles.cos(), tolerance=1e-6)
    assert_close(sines[:, 1::2], angles.sin(), tolerance=1e-6)
    assert torch.equal(cosines[:, 0::2], cosines[:, 1::2])
    assert torch.equal(sines[:, 0::2], -sines[:, 1::2])


def test_rope_keeps_the_type_and_rounds_once() -> None:
    x = noise(5, 2, 8).bfloat16()
    table = reference.rotary_table(torch.arange(5) + 1000, reference.rotary_frequencies(8, 10000.0, CPU))
    assert torch.equal(reference.apply_rotary(x, *table), reference.apply_rotary(x.float(), *table).bfloat16())


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(rows: int, bias: bool) -> None:
    x, weight = noise(rows, 24), noise(37, 24, seed=1)
    offset = noise(37, seed=2) if bias else None
    expected = x.double() @ weight.double().t() + (0 if offset is None else offset.double())
    assert_close(reference.linear(x, weight, offset), expected, tolerance=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_silu_mul_takes_the_gate_first(tokens: int) -> None:
    gate, up = noise(tokens, 9, scale=4.0), noise(tokens, 9, seed=1)
    expected = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    assert_close(reference.silu_mul(torch.cat([gate, up], dim=-1)), expected, tolerance=1e-6)


def routed(x: Tensor, router: Tensor, bias: Tensor, top: int, norm_min: float) -> list[dict[int, float]]:
    """Each token's experts and weights, in float64, one number at a time."""
    chosen = []
    for row in x.double():
        scores = [float(row @ expert) for expert in router.double()]
        powers = [math.exp(score - max(scores)) for score in scores]
        shares = [power / sum(powers) for power in powers]
        biased = [share + float(b) for share, b in zip(shares, bias, strict=True)]
        best = sorted(range(len(biased)), key=lambda expert: -biased[expert])[:top]
        total = max(sum(shares[expert] for expert in best), norm_min)
        chosen.append({expert: shares[expert] / total for expert in best})
    return chosen


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    tokens=st.integers(0, 6),
    count=st.integers(1, 12),
    top=st.integers(1, 12),
    norm_min=st.sampled_from([1e-12, 0.5, 2.0]),
    bias_scale=st.sampled_from([0.0, 0.3, 10.0]),
    seed=st.integers(0, 1000),
)
def test_route(tokens: int, count: int, top: int, norm_min: float, bias_scale: float, seed: int) -> None:
    top = min(top, count)
    x, router = noise(tokens, 16, seed=seed), noise(count, 16, seed=seed + 1, scale=0.5)
    bias = noise(count, seed=seed + 2, scale=bias_scale)
    weights, experts = reference.route(x, router, bias, top, norm_min)
    assert weights.shape == experts.shape == (tokens, top)
    assert weights.dtype == torch.float32
    expected = routed(x, router, bias, top, norm_min)
    for row, numbers, truth in zip(weights, experts.tolist(), expected, strict=True):
        assert set(numbers) == set(truth)
        assert_close(row, torch.tensor([truth[number] for number in numbers]), tolerance=1e-5)


def test_the_correction_bias_chooses_experts_but_does_not_weigh_them() -> None:
    x, router = noise(1, 8), torch.zeros(4, 8)
    weights, experts = reference.route(x, router, torch.tensor([0.0, 9.0, 0.0, 5.0]), 2, 1e-12)
    assert set(experts[0].tolist()) == {1, 3}
    assert_close(weights, torch.tensor([[0.5, 0.5]]), tolerance=1e-6)


def test_routing_of_bf16_tokens_is_float32_throughout() -> None:
    """Two experts whose scores differ by less than bf16 can tell."""
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    router = torch.full((2, 64), 0.5)
    router[1] += 2e-4
    _, experts = reference.route(x, router, torch.zeros(2), 1, 1e-12)
    assert experts.tolist() == [[1]]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(tokens=st.integers(0, 40), count=st.integers(1, 9), top=st.integers(1, 9), seed=st.integers(0, 1000))
def test_mix_experts(tokens: int, count: int, top: int, seed: int) -> None:
    top = min(top, count)
    x, gate_up, down = noise(tokens, 12, seed=seed), noise(count, 10, 12, seed=1), noise(count, 12, 5, seed=2)
    weights = noise(tokens, top, seed=seed + 1).abs()
    experts = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(seed + i))[:top]
                           for i in range(tokens)]) if tokens else torch.zeros(0, top, dtype=torch.int64)  # fmt: skip
    expected = torch.zeros(tokens, 12, dtype=torch.float64)
    for token in range(tokens):
        for weight, expert in zip(weights[token].double(), experts[token].tolist(), strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            expected[token] += weight * (down[expert].double() @ (gate * torch.sigmoid(gate) * up))
    assert_close(reference.mix_experts(x, weights, experts, gate_up, down), expected, tolerance=1e-5)


def test_experts_that_no_token_chose_are_not_read() -> None:
    x, gate_up, down = noise(3, 8), noise(4, 12, 8, seed=1), noise(4, 8, 6, seed=2)
    gate_up[[0, 2]] = math.nan
    down[[0, 2]] = math.nan
    mixed = reference.mix_experts(x, torch.full((3, 2), 0.5), torch.tensor([[1, 3]] * 3), gate_up, down)
    assert mixed.isfinite().all()


def test_experts_add_up_in_float32() -> None:
    """Terms that cancel: added in bf16 they would leave a rounding error larger than the result."""
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    gate_up = torch.full((3, 8, 4), 1.0, dtype=torch.bfloat16)
    down = torch.stack([torch.full((4, 4), value) for value in (64.0, 0.01, -64.0)]).bfloat16()
    mixed = reference.mix_experts(x, torch.ones(1, 3), torch.tensor([[2, 1, 0]]), gate_up, down)
    alone = reference.mix_experts(x, torch.ones(1, 1), torch.tensor([[1]]), gate_up, down)
    assert_close(mixed.float(), alone.float(), tolerance=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 5])
def test_write_kv_fills_its_slots_and_no_others(dtype: torch.dtype, head_dim: int) -> None:
    keys, values = (
        torch.full(shape, math.nan, dtype=dtype) for shape in reference.kv_cache_shapes(3, 4, 2, head_dim, dtype)
    )
    new_keys, new_values = noise(3, 2, head_dim).to(dtype), noise(3, 2, head_dim, seed=1).to(dtype)
    slots = torch.tensor([9, 0, 7])
    reference.write_kv(keys, values, new_keys, new_values, slots)
    found_keys, found_values = reference.read_kv(keys, values, torch.arange(12))
    assert torch.equal(found_keys[slots], new_keys)
    assert torch.equal(found_values[slots], new_values)
    for found in (found_keys, found_values):
        assert found.isnan().flatten(1).all(-1).sum() == 9
    reference.write_kv(keys, values, new_keys[:0], new_values[:0], torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("gpu", [True, False])
def test_an_fp8_cache_holds_what_rounding_leaves_and_ends_where_its_type_does(gpu: bool) -> None:
    fp8 = torch.float8_e4m3fn
    shapes = reference.kv_cache_shapes(3, 4, 2, 8, fp8, gpu=gpu)
    keys, values = (torch.full(shape, 2.0).to(fp8) for shape in shapes)
    new_keys, new_values = noise(3, 2, 8, scale=100.0).bfloat16(), noise(3, 2, 8, seed=1).bfloat16()
    new_keys[0, 1, 3], new_keys[0, 0, 0], new_values[2, 0, 5] = 1e6, math.nan, -math.inf
    slots = torch.tensor([9, 0, 7])
    reference.write_kv(keys, values, new_keys, new_values, slots)
    for found, new in zip(reference.read_kv(keys, values, torch.arange(12)), (new_keys, new_values), strict=True):
        assert found.dtype == torch.float32
        expected = new.double().clamp(-448.0, 448.0)
        exponents = expected.abs().clamp(min=2.0**-6).log2().floor()
        expected = (expected / 2.0 ** (exponents - 3)).round() * 2.0 ** (exponents - 3)
        assert torch.equal(found[slots].double().nan_to_num(), expected.nan_to_num())
        assert torch.equal(found[slots].isnan(), new.isnan())
        assert (found == 2.0).flatten(1).all(-1).sum() == 9


def test_write_kv_into_one_layer_of_a_cache_of_another_type() -> None:
    cache = torch.zeros(2, *reference.kv_cache_shapes(2, 4, 1, 2, torch.bfloat16)[0], dtype=torch.bfloat16)
    values = torch.zeros(reference.kv_cache_shapes(2, 4, 1, 2, torch.bfloat16)[1], dtype=torch.bfloat16)
    reference.write_kv(cache[1], values, torch.full((1, 1, 2), 0.1), torch.ones(1, 1, 2), torch.tensor([5]))
    assert cache[0].count_nonzero() == 0
    assert torch.equal(cache[1, 0, 1, 0, 1], torch.full((2,), 0.1).bfloat16())
