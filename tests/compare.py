"""How tests compare tensors: finiteness first, then an error that must be shown to be small. Knows no room."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest deviation, as a share of the largest magnitude in `expected`.

    Raises `AssertionError` if shapes differ or either tensor holds NaN or an infinity.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    for name, tensor in (("actual", actual), ("expected", expected)):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        assert bad == 0, f"{name} holds {bad} values of {tensor.numel()} that are not finite"
    if actual.numel() == 0:
        return 0.0
    error = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return error / scale if scale > 0 else error


def assert_close(actual: Tensor, expected: Tensor, *, tolerance: float) -> None:
    """Fail unless `relative_error` is at most `tolerance`."""
    error = relative_error(actual, expected)
    # Written so that an error that is NaN fails: `error > tolerance` would let it pass.
    if not (error <= tolerance):
        raise AssertionError(f"relative error {error:.3g} exceeds {tolerance:.3g}")


def rounds_rows_alike() -> bool:
    """Whether this machine's float32 products of 16 and more rows round a row alike, however many rows there are.

    Where they do, what is built on them must give bitwise the same result alone and in a batch.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 64, generator=generator), torch.randn(96, 64, generator=generator)
    whole = x @ weight.t()
    return all(torch.equal(x[:rows] @ weight.t(), whole[:rows]) for rows in (4, 8, 16, 17, 33, 100, 255, 256))
