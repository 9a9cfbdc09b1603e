"""Arrays on their way to a device and back: what arrives, and that the CPU copies nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tern.ops.placement import interpreted
from tern.ops.transfer import Arrival, send

ARRAYS = [
    np.arange(5, dtype=np.int64),
    np.empty(0, np.float32),
    np.array([1.5, -2.5, 3.25], np.float32),
    np.arange(12, dtype=np.int32).reshape(3, 4),
    np.array([0.1], np.float64),
    np.arange(8, dtype=np.float32).reshape(4, 2).T,
]


def test_the_cpu_shares_memory_with_the_arrays() -> None:
    array = np.arange(3)
    (tensor,) = send([array], torch.device("cpu"))
    array[0] = 7
    assert tensor.tolist() == [7, 1, 2]


@pytest.mark.parametrize("arrays", [ARRAYS, ARRAYS[::-1], ARRAYS[:1], ARRAYS[1:2], []], ids=len)
def test_what_is_sent_in_one_parcel_arrives(arrays: list[np.ndarray]) -> None:
    with interpreted():
        tensors = send(arrays, torch.device("cpu"))
    assert len(tensors) == len(arrays)
    for tensor, array in zip(tensors, arrays, strict=True):
        assert tensor.dtype == torch.from_numpy(array).dtype
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.is_contiguous()
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}) <= 1


def test_an_arrival_reads_as_the_tensor() -> None:
    assert Arrival(torch.tensor([[1, 2], [3, 4]])).tolist() == [[1, 2], [3, 4]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_host_waits_for_what_arrives_alone() -> None:
    device = torch.device("cuda")
    send(ARRAYS, device)
    Arrival(torch.ones(3, device=device)).tolist()  # makes pinned memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        tensors = send(ARRAYS, device)
        arrivals = [Arrival(tensor) for tensor in tensors if tensor.numel()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [arrival.tolist() for arrival in arrivals] == [array.tolist() for array in ARRAYS if array.size]
