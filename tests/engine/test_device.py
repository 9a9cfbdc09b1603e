"""Which device is taken, what is said of one that cannot be, and which errors mean what. The cards are made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tern.engine.device import (
    GpuFacts,
    current,
    free_unused_memory,
    is_device_lost,
    is_out_of_memory,
    resolve_device,
    unfit,
)
from tern.errors import OptionError

GB = 10**9


class Cards:
    """Makes torch believe in cards: each a name, a compute capability, total and free memory in GB."""

    def __init__(self, patch: pytest.MonkeyPatch, *cards: tuple[str, tuple[int, int], float, float]) -> None:
        def number(device: Any) -> int:
            return torch.device(device).index or 0

        def properties(device: Any) -> Any:
            name, (major, minor), total, _ = cards[number(device)]
            return SimpleNamespace(name=name, major=major, minor=minor, total_memory=int(total * GB))

        def memory(device: Any) -> tuple[int, int]:
            _, _, total, free = cards[number(device)]
            return int(free * GB), int(total * GB)

        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patch.setattr("torch.version.cuda", "13.0")
        patch.setattr("torch.cuda.is_available", lambda: bool(cards))
        patch.setattr("torch.cuda.device_count", lambda: len(cards))
        patch.setattr("torch.cuda.get_device_properties", properties)
        patch.setattr("torch.cuda.mem_get_info", memory)


def test_auto_is_the_first_card_that_can_be_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Cards(monkeypatch)
    assert resolve_device("auto") == torch.device("cpu")
    Cards(monkeypatch, ("NVIDIA H200", (9, 0), 150, 149.5))
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:0")
    assert resolve_device("cpu") == torch.device("cpu")
    assert not caplog.records
    Cards(monkeypatch, ("Tesla V100", (7, 0), 32, 32))
    assert resolve_device("auto") == torch.device("cpu")
    assert "Tesla V100 has compute capability 7.0" in caplog.text
    assert "on the processor" in caplog.text


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built for GPUs")
def test_a_torch_without_cuda_is_named() -> None:
    with pytest.raises(OptionError, match=r"device is 'cuda', but this torch .* was built without CUDA: install"):
        resolve_device("cuda")


def test_a_driver_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU")

    Cards(monkeypatch)
    monkeypatch.setattr("torch.cuda.init", init)
    wanted = r"'cuda:1', and this torch has CUDA 13.0, but .* \(Found no NVIDIA driver on your system\): install"
    with pytest.raises(OptionError, match=wanted):
        resolve_device("cuda:1")


def test_a_number_beyond_the_cards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Cards(monkeypatch, *[("NVIDIA H100", (9, 0), 80.0, 79.5)] * 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(OptionError, match="device is 'cuda:2', but there are 2 GPUs here: choose cuda:0 to cuda:1"):
        resolve_device("cuda:2")
    Cards(monkeypatch, ("NVIDIA H100", (9, 0), 80.0, 79.5))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    wanted = "'split:7', but there is 1 GPU here; CUDA_VISIBLE_DEVICES is '1': choose split:0"
    with pytest.raises(OptionError, match=wanted):
        resolve_device("split:7")


@pytest.mark.parametrize(
    ("visible", "said"),
    [
        ("", "CUDA_VISIBLE_DEVICES is '', which hides every card: unset it"),
        ("-1", "CUDA_VISIBLE_DEVICES is '-1', which hides every card: unset it"),
        ("MIG-4a5b", r"can be used \(No CUDA GPUs are available; CUDA_VISIBLE_DEVICES is 'MIG-4a5b'\): install"),
    ],
)
def test_cards_that_are_hidden_are_named(visible: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("No CUDA GPUs are available")

    Cards(monkeypatch)
    monkeypatch.setattr("torch.cuda.init", init)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(OptionError, match=said):
        resolve_device("cuda")


@pytest.mark.parametrize(
    ("capability", "fp8", "said"),
    [
        ((7, 5), False, "compute capability 7.5, and Tern's kernels need 8.0"),
        ((8, 0), False, None),
        ((8, 6), True, "compute capability 8.6, and fp8 needs 8.9"),
        ((8, 9), True, None),
        ((9, 0), True, None),
        ((12, 0), True, None),
    ],
)
def test_a_card_that_is_too_old_is_named(
    capability: tuple[int, int], fp8: bool, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = unfit(GpuFacts("Card", capability, GB, GB), fp8=fp8)
    assert (said is None) == (reason is None)
    Cards(monkeypatch, ("Card", capability, 24, 24))
    if said is None:
        assert resolve_device("cuda", fp8=fp8).type == "cuda"
    else:
        with pytest.raises(OptionError, match=said):
            resolve_device("cuda", fp8=fp8)


def test_other_processes_on_the_card_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Cards(monkeypatch, ("NVIDIA H100", (9, 0), 80, 19))
    resolve_device("cuda")
    assert "other processes hold 60.0 GB of cuda:0 (NVIDIA H100)" in caplog.text


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("error", "out", "lost"),
    [
        (OUT, True, False),
        (MemoryError(), True, False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True, False),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False, True),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), False, True),
        (RuntimeError("CUDA error: device-side assert triggered"), False, True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False, True),
        (RuntimeError("shape '[3]' is invalid"), False, False),
        (ValueError("CUDA error in a name"), False, False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_are_told_apart(error: Exception, out: bool, lost: bool) -> None:
    assert (is_out_of_memory(error), is_device_lost(error)) == (out, lost)


def test_nothing_is_asked_of_a_card_for_the_processor() -> None:
    with current(torch.device("cpu")):
        free_unused_memory(torch.device("cpu"))
