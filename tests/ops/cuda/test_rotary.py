"""Rotary embedding and writes to a GPU's cache by its kernel, beside the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tern import ops
from tern.ops import reference
from tern.ops.cuda import rotate_and_store
from tern.ops.placement import interpreted
from tests.compare import assert_close

FP8 = torch.float8_e4m3fn
ROWS = (torch.float32, torch.bfloat16, torch.float16)
SLOTS = 40
# A product and a sum may be rounded together: the last bit of float32, which seldom tips one of a narrower type.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10, FP8: 2**-3}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(rows: int, heads: tuple[int, int], head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All heads of `rows` tokens, their tables, and slots for them out of order."""
    positions = torch.arange(rows) * 12_973  # up to 129 730
    tables = reference.rotary_table(positions, reference.rotary_frequencies(head_dim, 5e5, torch.device("cpu")))
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1))[:rows]
    return noise(rows, (heads[0] + 2 * heads[1]) * head_dim), *tables, slots


def caches(block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Full of sevens."""
    shapes = reference.kv_cache_shapes(-(-SLOTS // block_size), block_size, kv_heads, head_dim, dtype, gpu=True)
    return [torch.full(shape, 7.0).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("cache_dtype", [*ROWS, FP8])
@pytest.mark.parametrize(
    ("rows", "heads", "head_dim", "block_size"),
    [(11, (20, 4), 128, 16), (1, (6, 2), 32, 5), (4, (3, 1), 96, 1), (5, (1, 1), 2, 16), (0, (2, 1), 16, 4)],
)
def test_rotate_and_store(
    rows: int,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: torch.device,
) -> None:
    qkv, *tables, slots = step(rows, heads, head_dim)
    qkv = qkv.to(dtype)
    theirs = caches(block_size, heads[1], head_dim, cache_dtype)
    mine = [part.to(device) for part in theirs]
    expected = reference.rotate_and_store(qkv, *tables, slots, *theirs)
    on_device = (tensor.to(device) for tensor in (qkv, *tables, slots))
    queries = rotate_and_store(*on_device, *mine).cpu()
    assert queries.dtype == dtype
    assert_close(queries.float(), expected.float(), tolerance=TOLERANCES[dtype])
    tolerance = max(TOLERANCES[dtype], TOLERANCES[cache_dtype])
    keys, expected_keys = mine[0].cpu().float(), theirs[0].float()
    assert_close(keys, expected_keys, tolerance=tolerance)
    assert rows == 0 or (keys != expected_keys).float().mean() < (1 if tolerance < 1e-5 else 0.01)
    assert torch.equal(keys == 7.0, expected_keys == 7.0)
    assert torch.equal(mine[1].cpu().float(), theirs[1].float())


def test_an_fp8_cache_ends_where_its_type_does(device: torch.device) -> None:
    rows, extremes = 2, [448.0, 464.0, 1e5, 3e38, -449.0, -1e9, 0.0, 2.0**-10]
    qkv = torch.zeros(rows, 4, 8)
    qkv[:, 1:] = torch.tensor(extremes)
    qkv[:, 3, 6:] = torch.nan
    still = torch.ones(rows, 8, device=device), torch.zeros(rows, 8, device=device)
    mine = [part.to(device) for part in caches(4, 1, 8, FP8)]
    rotate_and_store(qkv.flatten(1).to(device), *still, torch.tensor([3, 8], device=device), *mine)
    stored = torch.tensor([448.0, 448.0, 448.0, 448.0, -448.0, -448.0, 0.0, 0.0])
    for part, lost in zip(mine, (stored, stored.where(stored != 0, torch.nan)), strict=True):
        found = part.cpu().float().view(SLOTS, 8)
        assert torch.equal(found[[3, 8]].nan_to_num(nan=9.0), lost.nan_to_num(nan=9.0).expand(2, 8))
        assert (found == 7.0).all(-1).sum() == SLOTS - 2


def test_a_row_alone_is_as_in_a_batch(device: torch.device) -> None:
    qkv, *tables, slots = (tensor.to(device) for tensor in step(9, (5, 1), 64))
    mine, alone = ([part.to(device) for part in caches(16, 1, 64, torch.bfloat16)] for _ in range(2))
    queries = rotate_and_store(qkv.bfloat16(), *tables, slots, *mine)
    for row in range(9):
        one = (tensor[row : row + 1] for tensor in (qkv.bfloat16(), *tables, slots))
        assert torch.equal(rotate_and_store(*one, *alone)[0], queries[row])
    assert all(torch.equal(part, other) for part, other in zip(mine, alone, strict=True))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    qkv, *tables, slots = (tensor.to(device) for tensor in step(3, (2, 1), 16))
    keys, values = (part.to(device) for part in caches(4, 1, 16, torch.bfloat16))
    with pytest.raises(ValueError, match="GPU's cache"):
        rotate_and_store(qkv, *tables, slots, keys.transpose(2, 3), values)
    with pytest.raises(ValueError, match="contiguous and of one type"):
        rotate_and_store(qkv, *tables, slots, keys.float(), values)
    with pytest.raises(ValueError, match=r"float32 \[3, 16\]"):
        rotate_and_store(qkv, tables[0].double(), tables[1], slots, keys, values)
    with pytest.raises(ValueError, match=r"shape \[3\], not \[2\]"):
        rotate_and_store(qkv, *tables, slots[:2], keys, values)


def test_the_door_leads_to_it(device: torch.device) -> None:
    """`tern.ops` on what belongs to a GPU; a processor's cache has another shape, which the kernel refuses."""
    qkv, *tables, slots = (tensor.to(device) for tensor in step(3, (2, 1), 16))
    mine, theirs = ([part.to(device) for part in caches(4, 1, 16, FP8)] for _ in range(2))
    with interpreted():
        queries = ops.rotate_and_store(qkv, *tables, slots, *mine)
        with pytest.raises(ValueError, match="GPU's cache"):
            ops.rotate_and_store(qkv, *tables, slots, mine[0].view(1, -1, 4, 4, 4), mine[1])
    assert_close(queries, reference.rotate_and_store(qkv, *tables, slots, *theirs), tolerance=1e-6)
