"""Which attention library is chosen: what is refused, by which words, and what is never imported."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tern.errors import OptionError
from tern.ops import (
    AttentionWork,
    attention_libraries,
    check_attention_backend,
    choose_attention,
    installed_attention,
)
from tern.ops.placement import interpreted

CPU = torch.device("cpu")
WORK = AttentionWork(CPU, 20, 4, 128, torch.bfloat16, torch.bfloat16, 16)


@pytest.fixture(autouse=True)
def both_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries, none of which may be imported."""
    for module in ("flash_attn_interface", "flashinfer"):
        assert module not in sys.modules
        (tmp_path / f"{module}.py").write_text("raise RuntimeError('imported')\n")
    information = tmp_path / "flashinfer_python-0.7.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: flashinfer-python\nVersion: 0.7.2\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_what_is_installed_is_known_without_importing_it() -> None:
    assert installed_attention() == {"flash-attn": "of unknown version", "flashinfer": "0.7.2"}


def test_a_processor_never_imports_one() -> None:
    assert choose_attention("auto", WORK) is None
    assert choose_attention("tern", WORK) is None
    for name in ("flash-attn", "flashinfer"):
        with pytest.raises(OptionError, match=f"'{name}', but the device is cpu, .* on a GPU: .* auto or tern"):
            choose_attention(name, WORK)
    with interpreted():
        assert choose_attention("tern", WORK) is None
    assert not {"flash_attn_interface", "flashinfer"} & sys.modules.keys()


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"dtype": torch.float32}, "flash-attn", "FlashAttention-3 computes in bfloat16 or float16, not float32"),
        (
            {"cache_dtype": torch.float8_e4m3fn},
            "flashinfer",
            "FlashInfer has no kernel for bfloat16 over a cache of float8_e4m3fn",
        ),
        ({"head_dim": 80}, "flashinfer", "FlashInfer has no kernel for heads of 80"),
        ({"head_dim": 100}, "flash-attn", "FlashAttention-3 has no kernel for heads of 100"),
    ],
)
def test_what_cannot_be_is_refused_before_an_import(changes: dict[str, object], name: str, words: str) -> None:
    work = replace(WORK, **changes)
    with interpreted(), pytest.raises(OptionError, match=f"{words}: see docs/gpu.md, or choose auto or tern"):
        choose_attention(name, work)
    assert "flashinfer" not in sys.modules


def test_a_card_that_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_libraries, "_capability", lambda _: (8, 6))
    with interpreted(), pytest.raises(OptionError, match=r"FlashAttention-3 is not used on compute capability 8\.6"):
        choose_attention("flash-attn", WORK)


def test_a_package_that_cannot_be_imported(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    with interpreted():
        assert choose_attention("auto", WORK) is None
        with pytest.raises(OptionError, match=r"its trial failed \(RuntimeError: imported\)"):
            choose_attention("flashinfer", WORK)
    assert "flash-attn of unknown version is installed but not used: its trial failed" in caplog.text
    assert "flashinfer 0.7.2 is installed but not used" in caplog.text


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_libraries, "find_spec", lambda _: None)
    assert installed_attention() == {}
    with interpreted():
        assert choose_attention("auto", WORK) is None
        with pytest.raises(OptionError, match=r"no module flash_attn_interface \(a package flash-attn has .*-2"):
            check_attention_backend("flash-attn", CPU)
        with pytest.raises(OptionError, match="FlashInfer is not installed: there is no module flashinfer: see docs"):
            check_attention_backend("flashinfer", CPU)


def test_a_library_that_breaks_the_gpu_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even unasked: this process could compute nothing more."""
    pytest.importorskip("triton")
    from tern.ops.cuda import flash

    def breaks(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(flash, "open_library", breaks)
    with interpreted(), pytest.raises(OptionError, match=r"FlashAttention-3 broke the GPU's .* attention_backend tern"):
        choose_attention("auto", WORK)
