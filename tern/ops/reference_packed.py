"""Products with packed weights in plain torch: the truth that every kernel matches bit for bit.

Activations are rounded to int8, span by span of 256 depths; the sum over a span is exact; spans are added in float32,
first to last, product and sum each rounded. From the first product of a SwiGLU to the end of a layer all is float32.
Nothing of it depends on who computes it or what stands beside a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from tern.ops.packed import FACTORS, GROUP, PANEL, QUAD, PackedWeight
from tern.ops.rounding import round_to_bytes
from tern.ops.swiglu import SwiGLUWeights

SPAN = 256
"""Depths that share an activation scale."""
SHRINKS = tuple(1.0 - 0.05 * step for step in range(9))
"""Shares of the full range that are tried as a column's scale."""


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round `x` [T, depth] to integers, each span as `round_to_bytes` does -> int8 [T, depth], scales [T, spans]."""
    spans = (round_to_bytes(x[:, start : start + SPAN]) for start in range(0, x.shape[1], SPAN))
    values, scales = zip(*spans, strict=True)
    return torch.cat(values, dim=1), torch.stack(scales, dim=1)


def product(x: Tensor, weight: PackedWeight) -> Tensor:
    """`x` [T, at most depth] times every column of a packed weight -> [T, columns] float32."""
    values, scales = quantise_rows(functional.pad(x, (0, weight.depth - x.shape[1])))
    integers = weight.integers()
    total = torch.zeros(x.shape[0], weight.columns)
    for index, start in enumerate(range(0, weight.depth, SPAN)):
        part = slice(start, start + SPAN)
        exact = values[:, part].double() @ integers[:, part].double().t()
        total = total + exact.float() * scales[:, index, None]
    return total * weight.scales


def linear_packed(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`x` [T, in] times a packed weight [out, in], plus `bias` [out] -> [T, out] in the type of `x`."""
    output = product(x, weight)[:, : weight.out_features]
    return (output if bias is None else output + bias.float()).to(x.dtype)


def exp_of_negative(x: Tensor) -> Tensor:
    """e^x for `x` <= 0 in float32, by the steps of `csrc/elementwise.inl`; larger x and NaN count as 0."""
    x = torch.where(x < 0, x, 0.0)
    x = torch.where(x > -87, x, -87.0)
    n = (x * 1.44269504).round()
    r = x - n * 0.693359375
    r = r - n * -2.12194440e-4
    p = torch.full_like(x, 1.388888889e-3)
    for coefficient in (8.333333333e-3, 4.166666667e-2, 1.666666667e-1, 0.5, 1.0, 1.0):
        p = p * r + coefficient
    return p * torch.ldexp(torch.ones_like(x), n.to(torch.int32))


def silu_mul_exact(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, float32, with the rounding of the kernels."""
    e = exp_of_negative(torch.where(gate < 0, gate, -gate))
    return torch.where(gate < 0, gate * e, gate) / (1.0 + e) * up


def swiglu_float(x: Tensor, layer: SwiGLUWeights) -> Tensor:
    """The layer of `x` [T, in], not yet rounded to a narrower type: [T, out] float32."""
    gate_up, down = layer.gate_up, layer.down
    assert isinstance(gate_up, PackedWeight)
    assert isinstance(down, PackedWeight)
    inner = product(x, gate_up)
    if layer.gate_up_bias is not None:
        halves = layer.gate_up_bias.float().view(2, -1)
        inner = inner + functional.pad(halves, (0, gate_up.columns // 2 - halves.shape[1])).flatten()
    output = product(silu_mul_exact(*inner.chunk(2, dim=1)), down)[:, : down.out_features]
    return output if layer.down_bias is None else output + layer.down_bias.float()


def swiglu_packed(x: Tensor, layer: SwiGLUWeights) -> Tensor:
    """down(silu(gate(x)) * up(x)) with packed weights: [T, in] -> [T, out] in the type of `x`."""
    return swiglu_float(x, layer).to(x.dtype)


def mix_experts_packed(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    shared: SwiGLUWeights | None = None,
) -> Tensor:
    """`tern.ops.reference.mix_experts` with packed stacks, `shared` last; every term is added in float32."""
    mixed = torch.zeros(x.shape[0], down.out_features)
    for expert in range(gate_up.shape[0]):
        tokens, choices = (experts == expert).nonzero(as_tuple=True)
        if len(tokens) > 0:
            output = swiglu_float(x[tokens], SwiGLUWeights(gate_up[expert], down[expert]))
            mixed[tokens] = mixed[tokens] + output * weights[tokens, choices, None]
    if shared is not None:
        mixed = mixed + swiglu_float(x, shared)
    return mixed.to(x.dtype)


def pack(weight: Tensor, bits: int, parts: int = 1) -> PackedWeight:
    """Round `weight` [out, in], or a stack [experts, out, in], to 4 or 8 bits; see `PackedWeight` for `parts`.

    8 bits: each row's largest magnitude becomes 127. 4 bits: each group gets the factor of least squared error, each
    row the scale of least squared error among shares of the one that reaches its largest magnitude.
    """
    if weight.dim() == 3:
        packed = [pack(single, bits, parts) for single in weight]
        factors = None if bits == 8 else torch.stack([one.factors for one in packed if one.factors is not None])
        values, scales = (torch.stack([getattr(one, name) for one in packed]) for name in ("values", "scales"))
        return replace(packed[0], values=values, factors=factors, scales=scales)
    rows = _rounded_up(weight, parts)
    values, factors, scales = _pack_bytes(rows) if bits == 8 else _pack_nibbles(rows)
    return PackedWeight(values, factors, scales, weight.shape[0], weight.shape[1], parts)


def _pack_bytes(rows: Tensor) -> tuple[Tensor, None, Tensor]:
    scales = rows.abs().amax(dim=1) / 127
    integers = (rows / _divisor(scales)[:, None]).round().to(torch.int16)
    values = (integers + 128).to(torch.uint8).view(-1, PANEL, rows.shape[1] // QUAD, QUAD).transpose(1, 2)
    return values.contiguous(), None, scales


def _pack_nibbles(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = rows.view(rows.shape[0], -1, GROUP)
    largest = rows.abs().amax(dim=1)
    best: tuple[Tensor, ...] | None = None
    for shrink in SHRINKS:
        scales = largest * (shrink / (8 * max(FACTORS)))
        factors, errors = _best_factors(groups, scales)
        tried = (errors.sum(dim=1), scales, factors)
        if best is None:
            best = tried
            continue
        better = tried[0] < best[0]
        best = tuple(
            torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old) for new, old in zip(tried, best, strict=True)
        )
    assert best is not None
    _, scales, factors = best
    steps = scales[:, None] * factors
    q = (groups / _divisor(steps)[..., None]).round().clamp(-8, 7)
    return _nibbles(q), _codes(factors), scales


def _best_factors(groups: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """For `groups` [rows, groups, 32] and a scale a row: each group's best factor and its squared error [rows, groups].

    Tried are the factors that bring a group's largest magnitude nearest to q = -8, and nearest to 7.
    """
    extremes = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))[..., 0]
    exact = extremes / _divisor(scales)[:, None]
    best_errors = groups.new_full(groups.shape[:2], torch.inf)
    best_factors = torch.ones_like(best_errors)
    for target in (-8, 7):
        nearest = exact / target
        signs = torch.where(nearest < 0, -1.0, 1.0)
        for size in (nearest.abs().floor(), nearest.abs().ceil()):
            factors = signs * size.clamp(1, 8)
            steps = (scales[:, None] * factors)[..., None]
            errors = ((groups / _divisor(steps)).round().clamp(-8, 7) * steps - groups).square().sum(dim=2)
            better = errors < best_errors
            best_errors = torch.where(better, errors, best_errors)
            best_factors = torch.where(better, factors, best_factors)
    return best_factors, best_errors


def _nibbles(q: Tensor) -> Tensor:
    """q [columns, groups, 32] float -> bytes [panels, groups, 4, 16, 4]."""
    quads = (q + 8).to(torch.uint8).view(-1, PANEL, q.shape[1], GROUP // (2 * QUAD), 2, QUAD)
    quads = quads.permute(0, 2, 3, 4, 1, 5)
    return (quads[:, :, :, 0] | (quads[:, :, :, 1] << 4)).contiguous()


def _codes(factors: Tensor) -> Tensor:
    """Factors [columns, groups] -> bytes [panels, groups, 8]."""
    codes = torch.where(factors < 0, factors + 8, factors + 7).to(torch.uint8)
    panels = codes.view(-1, PANEL, codes.shape[1]).transpose(1, 2)
    return (panels[..., : PANEL // 2] | (panels[..., PANEL // 2 :] << 4)).contiguous()


def _rounded_up(weight: Tensor, parts: int) -> Tensor:
    """`weight` [out, in] in float32 with rows (after each part) and columns of zeros: [columns, depth]."""
    halves = weight.float().view(parts, weight.shape[0] // parts, weight.shape[1])
    return functional.pad(halves, (0, -weight.shape[1] % GROUP, 0, -halves.shape[1] % PANEL)).flatten(0, 1)


def _divisor(steps: Tensor) -> Tensor:
    """The same steps, but 1 where they are 0: whatever is divided there is 0 too."""
    return torch.where(steps == 0, 1.0, steps)
