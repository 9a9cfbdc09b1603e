"""Routing by a GPU's kernels, beside the reference in float32 and the truth in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tern import ops
from tern.ops import reference
from tern.ops.cuda import route, router
from tern.ops.cuda.arrival import counters
from tern.ops.cuda.experts import sort_by_expert
from tern.ops.placement import interpreted
from tests.compare import assert_close

TOLERANCE = 1e-5


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(rows: int, width: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return noise(rows, width).to(dtype), noise(experts, width, seed=1) / math.sqrt(width), noise(experts, seed=2) / 100


def check(x: Tensor, weight: Tensor, bias: Tensor, top: int, device: torch.device) -> None:
    weights, chosen = (found.cpu() for found in route(x.to(device), weight.to(device), bias.to(device), top, 1e-12))
    expected, expected_chosen = reference.route(x.double().float(), weight, bias, top, 1e-12)
    assert weights.dtype == torch.float32
    assert chosen.dtype == torch.int64
    assert chosen.shape == weights.shape == (x.shape[0], top)
    # Where the truth has two experts so near each other that float32 cannot tell, either is right.
    scores = ((x.double() @ weight.double().t()).softmax(-1) + bias).sort(-1, descending=True).values
    clear = (scores.diff(dim=-1).abs()[:, :top] > 1e-6).all(-1)
    assert clear.float().mean() > 0.9 or len(x) == 0
    assert torch.equal(chosen[clear], expected_chosen[clear])
    assert_close(weights[clear], expected[clear], tolerance=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "width", "experts", "top"),
    [(0, 8, 4, 2), (1, 40, 6, 6), (1, 2560, 64, 6), (17, 300, 64, 6), (9, 7, 1, 1), (5, 257, 33, 1), (2, 512, 20, 20)],
)
def test_route(rows: int, width: int, experts: int, top: int, dtype: torch.dtype, device: torch.device) -> None:
    check(*layer(rows, width, experts, dtype), top, device)


def test_the_tiles_of_many_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "_FEW_ROWS", 0)
    check(*layer(40, 300, 70, torch.bfloat16), 3, device)


def test_a_row_alone_is_as_in_a_batch(device: torch.device) -> None:
    x, weight, bias = (tensor.to(device) for tensor in layer(19, 600, 20, torch.bfloat16))
    weights, chosen = route(x, weight, bias, 4, 1e-12)
    for row in (0, 15, 16, 18):
        alone = route(x[row : row + 1], weight, bias, 4, 1e-12)
        assert torch.equal(alone[0][0], weights[row])
        assert torch.equal(alone[1][0], chosen[row])


@pytest.mark.parametrize(("experts", "top"), [(20, 4), (64, 6), (1, 1), (33, 33)])
@pytest.mark.parametrize("rows", [1, 2, 5, 31, 32, 33, 70])
def test_one_launch_gives_the_bits_of_two_and_sorts(
    rows: int, experts: int, top: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [tensor.to(device) for tensor in layer(rows, 300, experts, torch.bfloat16)]
    monkeypatch.setattr(router, "_LAST_SCORES", 128 * 64)
    weights, chosen, routing = router.choose(*given, top, 1e-12)
    monkeypatch.setattr(router, "_LAST_SCORES", 0)
    apart = router.choose(*given, top, 1e-12)
    assert apart[2] is None
    assert torch.equal(weights, apart[0])
    assert torch.equal(chosen, apart[1])
    assert routing is not None
    assert routing.experts_per_token == top
    sorted_apart = sort_by_expert(chosen, experts)
    assert torch.equal(routing.starts, sorted_apart.starts)
    assert torch.equal(routing.order, sorted_apart.order)
    assert routing.order.tolist() == chosen.flatten().argsort(stable=True).tolist()
    assert not counters(device).any()


def test_all_tokens_may_choose_one_expert(device: torch.device) -> None:
    x, weight, bias = (tensor.to(device) for tensor in layer(32, 40, 7, torch.float32))
    bias[4] = math.inf
    weights, chosen, routing = router.choose(x, weight, bias, 1, 1e-12)
    assert routing is not None
    assert routing.starts.tolist() == [0] * 5 + [32] * 3
    assert routing.order.tolist() == list(range(32))
    assert (chosen == 4).all()
    assert_close(weights, torch.ones_like(weights), tolerance=1e-6)


def test_few_tokens_and_experts_take_one_launch(device: torch.device) -> None:
    for rows, experts, one in ((1, 64, True), (32, 64, True), (33, 64, False), (4, 512, True), (5, 512, False)):
        given = (tensor.to(device) for tensor in layer(rows, 8, experts, torch.float32))
        assert (router.choose(*given, 2, 1e-12)[2] is not None) == one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="an interpreter multiplies tiles of other sizes otherwise")
def test_a_row_is_routed_alike_by_the_tiles_of_few_and_of_many(device: torch.device) -> None:
    x, weight, bias = (tensor.to(device) for tensor in layer(3000, 2560, 64, torch.bfloat16))
    weights, chosen = route(x, weight, bias, 6, 1e-12)
    for rows in (slice(0, 1), slice(7, 40), slice(2700, 2950)):
        few = route(x[rows], weight, bias, 6, 1e-12)
        assert torch.equal(few[0], weights[rows])
        assert torch.equal(few[1], chosen[rows])


def test_of_equal_experts_the_first_are_chosen(device: torch.device) -> None:
    zeros = torch.zeros(5, 16, device=device)
    weights, chosen = route(zeros[:2], zeros, zeros[:, 0], 3, 1e-12)
    assert chosen.tolist() == [[0, 1, 2]] * 2
    assert_close(weights, torch.full((2, 3), 1 / 3, device=device), tolerance=1e-6)


def test_the_bias_chooses_but_does_not_weigh(device: torch.device) -> None:
    bias = torch.tensor([-math.inf, 9.0, -1e30, 5.0, math.inf], device=device)
    zeros = torch.zeros(5, 16, device=device)
    weights, chosen = route(zeros[:1], zeros, bias, 5, 1e-12)
    assert chosen.tolist() == [[4, 1, 3, 2, 0]]
    assert_close(weights, torch.full((1, 5), 0.2, device=device), tolerance=1e-6)


def test_weights_of_little_are_not_blown_up(device: torch.device) -> None:
    x, weight, bias = (tensor.to(device) for tensor in layer(3, 16, 5, torch.float32))
    expected = reference.route(x, weight, bias, 2, 2.0)[0]
    assert_close(route(x, weight, bias, 2, 2.0)[0], expected, tolerance=1e-5)
    assert (expected.sum(-1) < 0.6).all()


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter's numpy
def test_a_row_of_nan_is_routed_somewhere_and_shows(device: torch.device) -> None:
    x = noise(3, 16).to(device)
    x[1] = math.nan
    weights, chosen = route(x, noise(5, 16, seed=1).to(device), torch.zeros(5, device=device), 2, 1e-12)
    assert weights[1].isnan().all()
    assert len(set(chosen[1].tolist())) == 2
    assert ((chosen >= 0) & (chosen < 5)).all()
    assert weights[[0, 2]].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter's numpy
def test_a_nan_of_one_expert_shows_in_all_weights(device: torch.device) -> None:
    x, weight, bias = (tensor.to(device) for tensor in layer(2, 16, 5, torch.float32))
    weight[3, 2] = math.nan
    weights, chosen = route(x, weight, bias, 2, 1e-12)
    assert weights.isnan().all()
    assert ((chosen >= 0) & (chosen < 5)).all()


def test_what_lies_beside_is_not_read(device: torch.device) -> None:
    x, weight, bias = (tensor.to(device) for tensor in layer(3, 40, 6, torch.float32))
    padded, router_padded = torch.full((5, 64), math.nan, device=device), torch.full((8, 64), math.nan, device=device)
    padded[:3, :40], router_padded[:6, :40] = x, weight
    expected = route(x, weight, bias, 2, 1e-12)
    found = route(padded[:3, :40], router_padded[:6, :40], bias, 2, 1e-12)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x, weight, bias = (tensor.to(device) for tensor in layer(3, 16, 5, torch.float32))
    with pytest.raises(ValueError, match=r"cannot be routed by torch.bfloat16"):
        route(x, weight.bfloat16(), bias, 2, 1e-12)
    with pytest.raises(ValueError, match=r"x \[3, 16\] cannot be routed by torch.float32 \[5, 15\]"):
        route(x, weight[:, :15], bias, 2, 1e-12)
    with pytest.raises(ValueError, match="5 experts cannot give 6"):
        route(x, weight, bias, 6, 1e-12)
    with pytest.raises(ValueError, match=r"with a bias \[1, 5\]"):
        route(x, weight, bias[None], 2, 1e-12)


def test_the_door_leads_to_it(device: torch.device) -> None:
    zeros = torch.zeros(5, 16, device=device)
    with interpreted(), pytest.raises(ValueError, match="5 experts cannot give 6"):
        ops.route(zeros, zeros, zeros[:, 0], 6, 1e-12)
    with interpreted():
        assert ops.route(zeros[:1], zeros, zeros[:, 0], 2, 1e-12)[1].tolist() == [[0, 1]]
