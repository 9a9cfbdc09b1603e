"""Tables of rotations by a GPU's kernel beside the reference."""

from __future__ import annotations

import pytest
import torch

from tern import ops
from tern.ops import reference
from tern.ops.cuda import rotary_table
from tern.ops.placement import interpreted
from tests.compare import assert_close


@pytest.mark.parametrize("head_dim", [2, 6, 96, 128])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_tables(rows: int, head_dim: int, device: torch.device) -> None:
    positions = (torch.arange(rows) * 3541).to(device)  # up to 127 476
    frequencies = reference.rotary_frequencies(head_dim, 5e5, device)
    for found, expected in zip(
        rotary_table(positions, frequencies), reference.rotary_table(positions, frequencies), strict=True
    ):
        assert found.is_contiguous()
        if device.type == "cuda":
            assert torch.equal(found, expected)
        else:  # the interpreter has other sines
            assert_close(found, expected, tolerance=1e-6)


def test_the_sine_of_the_first_of_a_pair_is_negated(device: torch.device) -> None:
    positions = torch.tensor([0, 1, 131_071], device=device)
    cosines, sines = rotary_table(positions, reference.rotary_frequencies(64, 5e5, device))
    assert torch.equal(sines[:, ::2], -sines[:, 1::2])
    assert torch.equal(cosines[:, ::2], cosines[:, 1::2])
    assert cosines[0].eq(1).all()
    assert sines[0].eq(0).all()


def test_the_door_leads_to_it(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    positions, frequencies = torch.arange(5, device=device), reference.rotary_frequencies(16, 5e5, device)
    expected = rotary_table(positions, frequencies)
    monkeypatch.setattr(reference, "rotary_table", lambda *_: pytest.fail("not on a GPU"))
    with interpreted():
        found = ops.rotary_table(positions, frequencies)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
