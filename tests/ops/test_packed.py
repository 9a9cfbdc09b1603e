"""Packed weights: their error, and kernels that match the reference bit for bit on every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tern.errors import OptionError
from tern.ops import cpu, reference, reference_packed
from tern.ops.packed import FACTORS, PackedWeight, unpack
from tern.ops.reference_packed import pack
from tern.ops.swiglu import SwiGLUWeights
from tests.compare import assert_close, relative_error

AVAILABLE = [found.name for found in cpu.instruction_sets() if found.available]
ROW_COUNTS = (0, 1, 2, 3, 4, 5, 11, 12, 13, 24, 25, 97, 130)


@pytest.fixture(params=[(name, threads) for name in AVAILABLE for threads in (1, 3)], ids=lambda p: f"{p[0]}-{p[1]}")
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Operations run on this instruction set."""
    name, threads = request.param
    with cpu.use_machine(name, threads) as machine:
        assert (machine.name, machine.threads) == (name, threads)
        yield name


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hostile_rows(count: int, width: int) -> Tensor:
    """Rows of ordinary size, then zeros, tiny and huge values, NaN and an infinity."""
    x = gaussian(count, width, seed=count) * 3
    for row, value in enumerate((0.0, 1e-35, 1e30, float("nan"), float("inf"))):
        if count > row + 5:
            x[row + 5, : width // 2] = value
    return x


def same(actual: Tensor, expected: Tensor) -> bool:
    return actual.dtype == expected.dtype and torch.allclose(actual, expected, rtol=0, atol=0, equal_nan=True)


# --- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(16, 32), (1, 1), (17, 33), (48, 100), (40, 544)])
def test_what_was_packed_comes_back_to_a_rounding(bits: int, shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    packed = pack(weight, bits)
    assert packed.shape == shape
    assert (packed.columns % 16, packed.depth % 32) == (0, 0)
    assert unpack(packed).shape == shape
    error = (unpack(packed) - weight).norm() / weight.norm()
    assert error < (0.1 if bits == 4 else 0.01)


def test_four_bits_err_no_more_than_groups_of_32_with_a_half_float_each() -> None:
    weight = gaussian(256, 2560)
    packed = pack(weight, 4)
    error = ((unpack(packed) - weight).norm() / weight.norm()).item()
    assert 8 * packed.nbytes / weight.numel() < 4.14
    groups = weight.view(256, -1, 32)  # GGML's Q4_0: the largest magnitude becomes -8
    extremes = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    steps = (extremes / -8).half().float()
    plain = (groups / steps).round().clamp(-8, 7) * steps
    assert error < 1.01 * ((plain - groups).norm() / groups.norm()).item()


def test_the_factors_tried_are_nearly_the_best_of_all() -> None:
    groups = gaussian(64, 8, 32)
    scales = groups.abs().amax((1, 2)) / 64
    steps = scales[:, None, None, None] * torch.tensor(FACTORS)[:, None]
    wide = groups[:, :, None]
    errors = ((wide / steps).round().clamp(-8, 7) * steps - wide).square().sum(-1).amin(-1)
    weight = pack(groups.flatten(1), 4)
    packed_error = (unpack(weight) - groups.flatten(1)).square().sum()
    assert packed_error < 1.02 * errors.sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_of_zeros_and_an_empty_group_stay_zero(bits: int) -> None:
    weight = gaussian(20, 96)
    weight[3] = 0
    weight[5, 32:64] = 0
    back = unpack(pack(weight, bits))
    assert back[3].abs().max() == 0
    assert back[5, 32:64].abs().max() == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_stacks_and_halves_are_cut_as_they_were_put_together(bits: int) -> None:
    stack = gaussian(3, 2 * 20, 40)
    packed = pack(stack, bits, parts=2)
    assert (packed.shape, packed.columns) == ((3, 40, 40), 64)
    for expert in range(3):
        assert torch.equal(unpack(packed[expert]), unpack(packed)[expert])
        for half in (slice(20), slice(20, 40)):
            assert torch.equal(unpack(packed[expert])[half], unpack(pack(stack[expert, half], bits)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(16, 32), (1, 1), (40, 100), (3, 40, 544)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_pack_like_the_reference(kernels: str, bits: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = gaussian(*shape).to(dtype)
    weight[..., 0, :] = 0
    parts = 2 if shape[-2] % 2 == 0 else 1
    actual, expected = cpu.pack(weight, bits, parts), pack(weight, bits, parts)
    assert (actual.shape, actual.columns, actual.parts) == (expected.shape, expected.columns, parts)
    assert_close(actual.scales, expected.scales, tolerance=1e-6)
    assert (unpack(actual) - weight).norm() <= 1.0001 * (unpack(expected) - weight).norm(), kernels
    for name in ("values", "factors"):
        mine, theirs = getattr(actual, name), getattr(expected, name)
        if theirs is not None:
            assert (mine != theirs).float().mean() < 1e-3, (kernels, name)


# --- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "depth"), [(16, 32), (7, 20), (130, 512), (48, 544), (100, 1100)])
def test_products_match_the_reference_bit_for_bit(kernels: str, bits: int, out: int, depth: int) -> None:
    weight = pack(gaussian(out, depth), bits)
    for rows, dtype in itertools.product(ROW_COUNTS, (torch.float32, torch.bfloat16)):
        x = hostile_rows(rows, depth).to(dtype)
        bias = gaussian(out, seed=1).to(dtype) if rows % 2 else None
        expected = reference_packed.linear_packed(x, weight, bias)
        assert same(cpu.linear_packed(x, weight, bias), expected), (kernels, rows, dtype)


def test_a_product_is_near_that_of_the_whole_weight() -> None:
    weight, x = gaussian(96, 1000), gaussian(9, 1000, seed=1)
    exact = reference.linear(x, weight)
    assert relative_error(cpu.linear_packed(x, pack(weight, 8)), exact) < 0.02
    assert relative_error(cpu.linear_packed(x, pack(weight, 4)), exact) < 0.15
    assert_close(cpu.linear_packed(x, pack(weight, 4)), reference.linear(x, unpack(pack(weight, 4))), tolerance=0.02)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_the_rows_beside_it(kernels: str, bits: int) -> None:
    weight, x = pack(gaussian(64, 640), bits), gaussian(130, 640, seed=2)
    whole = cpu.linear_packed(x, weight)
    for row in (0, 1, 77, 129):
        assert torch.equal(cpu.linear_packed(x[row : row + 1], weight)[0], whole[row]), (kernels, row)


def test_rows_that_lie_apart_and_off_alignment_are_read_right(kernels: str) -> None:
    weight = pack(gaussian(40, 96), 4)
    poisoned = torch.full((9, 200), float("nan"))
    poisoned[:, 3:99] = gaussian(9, 96, seed=3)
    expected = reference_packed.linear_packed(poisoned[:, 3:99].clone(), weight)
    assert torch.equal(cpu.linear_packed(poisoned[:, 3:99], weight), expected), kernels


# --- SwiGLU and experts ---------------------------------------------------------------------------------------------


def test_the_exponential_is_within_its_bound() -> None:
    x = torch.linspace(-87, 0, 100_001)
    exact = x.double().exp()
    assert ((reference_packed.exp_of_negative(x).double() - exact) / exact).abs().max() < 3e-7
    gate, up = gaussian(5000) * 20, gaussian(5000, seed=1)
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    assert_close(reference_packed.silu_mul_exact(gate, up).double(), expected, tolerance=1e-6)


def swiglu_layer(hidden: int, width: int, bits: int, bias: bool, seed: int = 0) -> SwiGLUWeights:
    gate_up = pack(gaussian(2 * width, hidden, seed=seed) / hidden**0.5, bits, parts=2)
    down = pack(gaussian(hidden, width, seed=seed + 1) / width**0.5, bits)
    if not bias:
        return SwiGLUWeights(gate_up, down)
    return SwiGLUWeights(gate_up, down, gaussian(2 * width, seed=seed + 2), gaussian(hidden, seed=seed + 3))


@pytest.mark.parametrize(
    ("hidden", "width", "bits", "bias"), [(64, 48, 4, False), (100, 20, 4, True), (48, 520, 8, True)]
)
def test_a_swiglu_matches_the_reference_bit_for_bit(
    kernels: str, hidden: int, width: int, bits: int, bias: bool
) -> None:
    layer = swiglu_layer(hidden, width, bits, bias)
    for rows, dtype in itertools.product(ROW_COUNTS, (torch.float32, torch.bfloat16)):
        x = hostile_rows(rows, hidden).to(dtype)
        assert same(cpu.swiglu_packed(x, layer), reference_packed.swiglu_packed(x, layer)), (kernels, rows, dtype)


def expert_stacks(experts: int, hidden: int, width: int, bits: int) -> tuple[PackedWeight, PackedWeight]:
    gate_up = pack(gaussian(experts, 2 * width, hidden) / hidden**0.5, bits, parts=2)
    return gate_up, pack(gaussian(experts, hidden, width, seed=1) / width**0.5, bits)


def choices(rows: int, experts: int, per_token: int) -> tuple[Tensor, Tensor]:
    """Weights and experts for `rows` tokens; the last expert is never chosen where there is a choice."""
    scores = torch.rand(rows, experts, generator=torch.Generator().manual_seed(rows))
    if experts > per_token:
        scores[:, -1] = -1
    return torch.softmax(scores, dim=1)[:, :per_token], scores.topk(per_token, dim=1).indices


@pytest.mark.parametrize(
    ("experts", "per_token", "hidden", "width", "bits", "shared"),
    [(8, 3, 64, 48, 4, 96), (5, 5, 100, 20, 4, 0), (6, 2, 40, 32, 8, 20), (1, 1, 32, 16, 4, 0)],
)
def test_experts_match_the_reference_bit_for_bit(
    kernels: str, experts: int, per_token: int, hidden: int, width: int, bits: int, shared: int
) -> None:
    gate_up, down = expert_stacks(experts, hidden, width, bits)
    beside = swiglu_layer(hidden, shared, bits, bias=True, seed=9) if shared else None
    for rows, dtype in itertools.product((0, 1, 2, 5, 30, 70, 130), (torch.float32, torch.bfloat16)):
        x = hostile_rows(rows, hidden).to(dtype)
        given = (x, *choices(rows, experts, per_token), gate_up, down, beside)
        assert same(cpu.mix_experts_packed(*given), reference_packed.mix_experts_packed(*given)), (kernels, rows, dtype)


def test_packed_experts_are_near_the_plain_ones() -> None:
    hidden, width = 256, 128
    plain_gate_up = gaussian(6, 2 * width, hidden) / hidden**0.5
    plain_down = gaussian(6, hidden, width, seed=1) / width**0.5
    shared = SwiGLUWeights(plain_gate_up[0], plain_down[0])
    x, chosen = gaussian(20, hidden, seed=2), choices(20, 6, 2)
    expected = reference.mix_experts(x, *chosen, plain_gate_up, plain_down, shared)
    packed_shared = SwiGLUWeights(pack(plain_gate_up[0], 8, parts=2), pack(plain_down[0], 8))
    actual = cpu.mix_experts_packed(x, *chosen, pack(plain_gate_up, 8, 2), pack(plain_down, 8), packed_shared)
    assert_close(actual, expected, tolerance=0.03)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_operands_that_do_not_fit_are_refused_before_a_kernel_sees_them() -> None:
    weight = pack(gaussian(16, 32), 4)
    for x, complaint in (
        (gaussian(2, 33), "takes 32 inputs"),
        (gaussian(2, 32).half(), "float16"),
        (gaussian(2, 32).to("meta"), "meta"),
    ):
        with pytest.raises(ValueError, match=complaint):
            cpu.linear_packed(x, weight)
    short = PackedWeight(weight.values[:, :0], weight.factors, weight.scales, 16, 32)
    with pytest.raises(ValueError, match="values of a packed weight"):
        cpu.linear_packed(gaussian(2, 32), short)
    with pytest.raises(ValueError, match="swiglu_packed"):
        cpu.linear_packed(gaussian(2, 32), pack(gaussian(32, 32), 4, parts=2))


@pytest.mark.parametrize("number", [-1, 4])
def test_an_expert_that_is_not_there_is_refused(number: int) -> None:
    gate_up, down = expert_stacks(4, 32, 16, 4)
    with pytest.raises(ValueError, match="no such expert"):
        cpu.mix_experts_packed(gaussian(1, 32), torch.ones(1, 1), torch.tensor([[number]]), gate_up, down)


def test_the_instruction_set_may_be_forced_but_not_beyond_the_processor() -> None:
    assert cpu.choose_instruction_set(None) == AVAILABLE[0]
    for name in AVAILABLE:
        assert cpu.choose_instruction_set(name) == name
    with pytest.raises(
        OptionError, match=r"TERN_FORCE_ISA is 'mmx', but there are no such kernels: choose from .*portable"
    ):
        cpu.choose_instruction_set("mmx")
    for found in cpu.instruction_sets():
        if not found.available:
            with pytest.raises(OptionError, match="this processor lacks it"):
                cpu.choose_instruction_set(found.name)


def test_threads_are_bounded_by_the_processors() -> None:
    usable = cpu.usable_processors()
    assert cpu.choose_threads(None) == usable
    assert cpu.choose_threads("1") == 1
    assert cpu.choose_threads(f"00{usable}") == usable
    for many in (str(usable + 1), "9" * 30):
        with pytest.raises(OptionError, match=f"may use {usable} processors.*choose at most {usable}"):
            cpu.choose_threads(many)
    for wrong in ("0", "000", "-1", "two", "1.5", "²"):
        with pytest.raises(OptionError, match="TERN_NUM_THREADS"):
            cpu.choose_threads(wrong)
