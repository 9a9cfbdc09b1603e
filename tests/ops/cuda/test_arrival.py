"""Of the programs that share a counter exactly one is the last, each time, and it finds what the others stored."""

from __future__ import annotations

import pytest
import torch

from tern.ops.cuda.arrival import MOST, counters, is_last
from tern.ops.cuda.launch import INTERPRETED, tl, triton


@triton.jit
def _last_adds(parts, sums, arrivals, counter, PROGRAMS: tl.constexpr, WIDTH: tl.constexpr):
    program, group = tl.program_id(0), tl.program_id(1)
    tl.store(parts + group * PROGRAMS + program, (program + 1) * (group + 1))
    if is_last(counter + group, PROGRAMS):
        others = tl.arange(0, WIDTH)
        found = tl.load(parts + group * PROGRAMS + others, mask=others < PROGRAMS, other=0, cache_modifier=".cg")
        tl.store(sums + group, tl.sum(found, axis=0))
        tl.atomic_add(arrivals + group, 1)


@pytest.mark.parametrize(("programs", "groups"), [(1, 1), (2, 3), (7, 5), (64, 40)])
def test_the_last_program_finds_all_parts(programs: int, groups: int) -> None:
    device = torch.device("cpu" if INTERPRETED else "cuda")
    counter = counters(device)
    expected = torch.arange(1, groups + 1, device=device, dtype=torch.int32) * (programs * (programs + 1) // 2)
    arrivals = torch.zeros(groups, dtype=torch.int32, device=device)
    for _ in range(3 if INTERPRETED else 100):
        parts = torch.zeros(groups, programs, dtype=torch.int32, device=device)
        sums = torch.zeros(groups, dtype=torch.int32, device=device)
        arrivals.zero_()
        sizes = {"PROGRAMS": programs, "WIDTH": triton.next_power_of_2(programs)}
        _last_adds[(programs, groups)](parts, sums, arrivals, counter, **sizes)
        assert torch.equal(sums, expected)
        assert torch.equal(arrivals, torch.ones_like(arrivals)), "one program of each group is the last"
        assert not counter.any(), "the next launch finds zeros"
    assert len(counter) == MOST
