"""A block of the cache as bytes: whatever the dtype and shapes, what is copied out goes back in, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from tern import ops
from tern.model.batch import KVCache

BLOCKS = 5


def cache(dtype: torch.dtype, *, layers: int = 3, extra: int = 0) -> KVCache:
    """A cache full of noise; `extra` numbers more in the last dimension than the heads have."""
    generator = torch.Generator().manual_seed(3)
    keys, values = ops.kv_cache_shapes(BLOCKS, 4, 2, 8, dtype)
    shapes = (layers, *keys[:-1], keys[-1] + extra), (layers, *values[:-1], values[-1] + extra)
    parts = (torch.randint(-100, 100, shape, generator=generator).to(dtype) for shape in shapes)
    return KVCache(*parts)


def as_bytes(part: torch.Tensor) -> torch.Tensor:
    return part.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("extra", [0, 4])
@pytest.mark.parametrize("block", [0, 2, BLOCKS - 1])
def test_a_blocks_bytes_go_out_and_in(dtype: torch.dtype, extra: int, block: int) -> None:
    source, target = cache(dtype, extra=extra), cache(dtype, extra=extra)
    target.keys.zero_()
    target.values.zero_()
    expected = sum(part[:, :, block].numel() * dtype.itemsize for part in (source.keys, source.values))
    content = memoryview(bytearray(source.block_bytes))
    assert source.block_bytes == expected == len(content)
    source.copy_block(block, content)
    in_order = [part[:, :, block].contiguous().view(torch.uint8) for part in (source.keys, source.values)]
    assert bytes(content) == b"".join(part.numpy().tobytes() for part in in_order)
    target.fill_block(block, content)
    for filled, original in ((target.keys, source.keys), (target.values, source.values)):
        assert torch.equal(as_bytes(filled[:, :, block]), as_bytes(original[:, :, block]))
        others = [number for number in range(BLOCKS) if number != block]
        assert not as_bytes(filled)[:, :, others].any()
