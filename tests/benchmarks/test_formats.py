"""Rounding as formats define it, its errors, and the random GGUF that llama.cpp is timed on."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import q4_error, random_gguf
from benchmarks.q4_error import draw_inputs, draw_weights, measure, round_fp8, round_q4_0
from tern.checkpoint import resolve_model
from tern.model import parameter_shapes


def plain_q4_0(group: list[float]) -> list[float]:
    """One group as GGML's reference rounds it, number by number."""
    largest = max(group, key=abs)
    scale = np.float32(largest) / np.float32(-8)
    inverse = np.float32(1) / scale if scale else np.float32(0)
    codes = [min(15, int(np.float32(value) * inverse + np.float32(8.5))) for value in group]
    return [(code - 8) * float(np.float32(np.float16(scale))) for code in codes]


@pytest.mark.parametrize("kind", ["normal", "t4"])
def test_q4_0_is_rounded_group_by_group(kind: str) -> None:
    weight = draw_weights(kind, 6, 96, torch.Generator().manual_seed(1))
    weight[0, :32] = 0
    weight[1, :32] = torch.tensor([-1.0, 1.0] * 16)
    groups = weight.view(-1, 32).tolist()
    assert round_q4_0(weight).view(-1, 32).tolist() == [plain_q4_0(group) for group in groups]


def test_fp8_keeps_the_largest_and_zero() -> None:
    weight = torch.tensor([[0.0, 0.5, -7.0]])
    assert round_fp8(weight)[0, [0, 2]].tolist() == [0.0, -7.0]


@pytest.mark.parametrize(("kind", "fourth"), [("normal", 3.0), ("t4", 6.0)])
def test_weights_have_the_variance_and_the_tails_they_should(kind: str, fourth: float) -> None:
    weight = draw_weights(kind, 1000, 256, torch.Generator().manual_seed(0)) * 16
    assert weight.square().mean().item() == pytest.approx(1.0, rel=0.05)
    kurtosis = weight.pow(4).mean().item()
    assert kurtosis > 2 * fourth if kind == "t4" else kurtosis == pytest.approx(fourth, rel=0.05)


def test_outlier_channels_are_few_and_large() -> None:
    x = draw_inputs("outliers", 200, torch.Generator().manual_seed(0))
    large = x.square().mean(0).sqrt() > 8
    assert int(large.sum()) == q4_error.OUTLIERS


def test_more_bits_err_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q4_error, "SLICE", 1500)  # several slices a layer, the last one shorter
    found = list(measure(resolve_model("dummy:tiny").config))
    assert len(found) == 5 * 2 * 2
    for each in found:
        errors = each.errors
        assert errors["bf16"] < errors["wint8"] < errors["wint4"] < 0.2, each
        assert errors["bf16"] < errors["fp8"] < errors["Q4_0"] < 0.2, each
        assert errors["wint4"] < 1.2 * errors["Q4_0"], each


def test_errors_are_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["q4_error", "--model", "dummy:tiny", "--json", str(tmp_path / "out.json")])
    q4_error.main()
    assert "Q4_0" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))) == 20


def test_a_gguf_holds_the_network_s_parameters(tmp_path: Path) -> None:
    config = resolve_model("dummy:tiny").config
    tensors = list(random_gguf.entries(config))
    names = {entry.name for entry in tensors}
    assert len(names) == len(tensors)
    held = sum(np.prod(entry.shape) for entry in tensors)
    assert held == sum(np.prod(shape) for shape in parameter_shapes(config).values())

    path = tmp_path / "tiny.gguf"
    random_gguf.write(path, config)
    content = path.read_bytes()
    assert struct.unpack_from("<4sIQQ", content) == (b"GGUF", 3, len(tensors), 27)
    sizes = [random_gguf.data(entry, np.random.default_rng(0)).nbytes for entry in tensors]
    assert len(content) % 32 == 0
    assert sum(sizes) < len(content) < sum(sizes) + 32 * len(tensors) + 300_000
    (first,) = (entry for entry in tensors if entry.name == "token_embd.weight")
    start = content.index(random_gguf.data(first, np.random.default_rng(0)).tobytes())
    assert start % 32 == 0
    name = content.index(b"output_norm.weight") + len("output_norm.weight")
    dimensions, size, kind, offset = struct.unpack_from("<IQIQ", content, name)
    assert (dimensions, size, kind) == (1, config.hidden_size, random_gguf.F32)
    norm = np.frombuffer(content, np.float32, config.hidden_size, start + offset)
    assert (norm == 1.0).all()


def test_q4_0_bytes_mean_a_layer_s_weights() -> None:
    entry = random_gguf.Entry("x", (8, 256))
    packed = random_gguf.data(entry, np.random.default_rng(3)).reshape(-1, random_gguf.GROUP_BYTES)
    scales = packed[:, :2].copy().view(np.float16).astype(np.float64)
    nibbles = np.concatenate([packed[:, 2:] & 15, packed[:, 2:] >> 4], axis=1).astype(np.float64) - 8
    assert np.square(scales * nibbles).mean() * 256 == pytest.approx(1.0, rel=0.1)
