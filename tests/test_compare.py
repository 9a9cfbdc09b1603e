"""The comparator itself: it must reject what a careless one lets pass."""

from __future__ import annotations

import math

import pytest
import torch

from tests.compare import assert_close, relative_error


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_rejected_on_either_side(poison: float) -> None:
    good, bad = torch.ones(4), torch.tensor([1.0, poison, 1.0, 1.0])
    for actual, expected in ((bad, good), (good, bad), (bad, bad)):
        with pytest.raises(AssertionError, match="not finite"):
            assert_close(actual, expected, tolerance=1e9)


def test_a_tolerance_of_nan_accepts_nothing() -> None:
    with pytest.raises(AssertionError):
        assert_close(torch.ones(2), torch.zeros(2), tolerance=math.nan)


def test_shapes_must_agree_without_broadcasting() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(1), torch.ones(4), tolerance=1.0)


def test_the_error_is_relative_to_the_largest_expected_value() -> None:
    expected = torch.tensor([0.0, -200.0])
    assert relative_error(torch.tensor([1.0, -200.0]), expected) == pytest.approx(0.005)
    assert_close(torch.tensor([1.0, -200.0]), expected, tolerance=0.0051)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(torch.tensor([1.0, -200.0]), expected, tolerance=0.0049)


def test_against_zeros_the_error_is_absolute() -> None:
    assert relative_error(torch.tensor([0.25]), torch.zeros(1)) == 0.25
