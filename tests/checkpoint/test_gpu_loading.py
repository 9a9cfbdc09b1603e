"""Weights on their way to a GPU, which the CPU stands for: staged run by run, rounded there, in its own layouts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_writer import dense_model, fused_tensors, moe_model, mtp_tensors, pt_tensors, write_checkpoint
from gguf_writer import write_gguf
from test_gguf import wide_moe
from test_layouts import LAYOUTS, NETWORKS, assert_same, canonical, logits

from tern import ops
from tern.checkpoint import (
    FP8_QUANTIZATIONS,
    QUANTIZATIONS,
    gpu_rounding,
    load_model,
    load_tensors,
    quantise_checkpoint,
    resolve_model,
    split_bytes,
    staging,
    weight_bytes,
)
from tern.checkpoint.gpu_rounding import round_matrices
from tern.checkpoint.quantisation import ROUTED_EXPERTS, packed_bits
from tern.checkpoint.safetensors_file import MappedFiles
from tern.errors import CheckpointError, OptionError
from tern.ops import gpu_weights, reference_packed, split_experts
from tern.ops.placement import interpreted
from tests.memory_peak import MemoryPeak

ROUNDED = [*QUANTIZATIONS, *FP8_QUANTIZATIONS]


@pytest.fixture
def gpu() -> Iterator[None]:
    """The CPU's memory counts as a GPU's."""
    with interpreted():
        yield


@pytest.fixture(params=[1024, 5000, staging.CHUNK_BYTES], ids="{} bytes".format)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How much travels together: few rows, more rows, whole tensors."""
    monkeypatch.setattr(staging, "CHUNK_BYTES", request.param)
    return int(request.param)


@pytest.mark.usefixtures("gpu", "chunk")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_arrives_bit_equal(tmp_path: Path, layout: str, network: str) -> None:
    model = NETWORKS[network]()
    tensors = LAYOUTS[layout](model)
    source = resolve_model(str(write_checkpoint(tmp_path / "it", model, tensors, shards=2)))
    found = load_tensors(source)
    assert_same(found, canonical(model))  # type: ignore[arg-type]


@pytest.mark.usefixtures("gpu", "chunk")
def test_dtypes_are_converted_on_the_way(tmp_path: Path) -> None:
    model = moe_model(dtype=torch.bfloat16)
    tensors = pt_tensors(model) | {name: each.bfloat16() for name, each in mtp_tensors().items()}
    source = resolve_model(str(write_checkpoint(tmp_path / "it", model, tensors, num_nextn_predict_layers=1)))
    found = load_tensors(source, dtype=torch.float16)
    for name, tensor in found.items():
        wide = name.endswith(("router", "correction_bias"))
        assert isinstance(tensor, torch.Tensor)
        assert tensor.dtype == (torch.float32 if wide else torch.float16), name
    assert torch.equal(found["embed"], tensors["model.embed_tokens.weight"].half())  # type: ignore[arg-type]


def floats(weight: ops.Weight) -> torch.Tensor:
    if isinstance(weight, torch.Tensor):
        return weight.float()
    return ops.unpack(weight) if isinstance(weight, ops.PackedWeight) else weight.floats()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers_are_those_of_the_cpu(tmp_path: Path, layout: str, quantization: str) -> None:
    model = moe_model(dtype=torch.bfloat16)
    source = resolve_model(str(write_checkpoint(tmp_path / "it", model, LAYOUTS[layout](model))))
    on_cpu = load_tensors(source, quantization=quantization)
    with interpreted():
        found = load_tensors(source, quantization=quantization)
        assert load_model(source, quantization=quantization).quantization == quantization
        size = weight_bytes(source.config, torch.bfloat16, quantization, gpu=True)
    assert found.keys() == on_cpu.keys()
    for name, weight in found.items():
        assert isinstance(weight, ops.RowPackedWeight) == isinstance(on_cpu[name], ops.PackedWeight), name
        assert tuple(weight.shape) == tuple(on_cpu[name].shape)
        assert torch.equal(floats(weight), floats(on_cpu[name])), name
    assert sum(weight.nbytes for weight in found.values()) == size


@pytest.mark.parametrize("quantization", FP8_QUANTIZATIONS)
def test_fp8_is_the_stored_weights_rounded(tmp_path: Path, quantization: str) -> None:
    model = moe_model(dtype=torch.bfloat16, hidden_size=160, moe_intermediate_size=72)
    source = resolve_model(str(write_checkpoint(tmp_path / "it", model, pt_tensors(model))))
    plain = load_tensors(source)
    with interpreted():
        found = load_tensors(source, quantization=quantization)
        assert load_model(source, quantization=quantization).quantization == quantization
        size = weight_bytes(source.config, torch.bfloat16, quantization, gpu=True)
    for name, weight in found.items():
        original = plain["embed" if name == "head" else name]
        assert isinstance(original, torch.Tensor)
        if packed_bits(name, quantization) is None:
            assert torch.equal(weight, original), name  # type: ignore[arg-type]
            continue
        assert isinstance(weight, ops.Fp8Weight), name
        matrices = original if original.dim() == 3 else [original]
        rounded = [ops.round_to_fp8(each, block_wise=FP8_QUANTIZATIONS[quantization]).floats() for each in matrices]
        assert torch.equal(weight.floats(), torch.stack(rounded).view(original.shape)), name
        assert weight.scales.shape[-2:] == (1, 1) or quantization == "block_wise_fp8"
    assert sum(weight.nbytes for weight in found.values()) == size


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("quantization", [None, *QUANTIZATIONS])
def test_a_gguf_arrives_as_on_the_cpu(tmp_path: Path, quantization: str | None) -> None:
    write_gguf(tmp_path / "it.gguf", wide_moe(), "Q4_0")
    source = resolve_model(tmp_path / "it.gguf")
    on_cpu = load_tensors(source, quantization=quantization or "none")
    with interpreted():
        found = load_tensors(source, quantization=quantization or "none")
    for name, weight in found.items():
        assert torch.equal(floats(weight), floats(on_cpu[name])), name


@pytest.mark.parametrize("bits", QUANTIZATIONS.values())
def test_a_packed_checkpoint_is_laid_out_for_the_gpu(tmp_path: Path, bits: int) -> None:
    source = resolve_model(str(write_checkpoint(tmp_path / "it", moe_model(), pt_tensors(moe_model()))))
    quantise_checkpoint(source, tmp_path / "packed", bits)
    packed = resolve_model(tmp_path / "packed")
    on_cpu = load_tensors(packed, dtype=torch.bfloat16)
    with interpreted():
        found = load_tensors(packed, dtype=torch.bfloat16)
        with pytest.raises(OptionError, match=r"split is .* packed in . bits already"):
            load_tensors(packed, split=f"wint{12 - bits}")
        apart = load_tensors(packed, split=f"wint{bits}")
    assert {type(weight) for weight in found.values()} == {torch.Tensor, ops.RowPackedWeight}
    for name, weight in found.items():
        assert torch.equal(floats(weight), floats(on_cpu[name])), name
        assert isinstance(apart[name], ops.PackedWeight) == name.endswith(ROUTED_EXPERTS)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("quantization", [None, *ROUNDED])
def test_synthetic_weights_have_their_forms(quantization: str | None) -> None:
    source = resolve_model("dummy:tiny")
    found = load_tensors(source, quantization=quantization)
    assert sum(weight.nbytes for weight in found.values()) == weight_bytes(
        source.config, torch.bfloat16, quantization, gpu=True
    )
    again = load_tensors(source, quantization=quantization)
    plain = load_tensors(source)
    for name, weight in found.items():
        rounded = quantization is not None and packed_bits(name, quantization) is not None
        assert isinstance(weight, torch.Tensor) != rounded, name
        assert torch.equal(floats(weight), floats(again[name])), name
        if isinstance(weight, ops.Fp8Weight):
            drawn = floats(plain["embed" if name == "head" else name])
            assert (floats(weight) - drawn).norm() < 0.04 * drawn.norm(), name


@pytest.mark.parametrize("stored", [None, "gguf"])
@pytest.mark.parametrize("quantization", [None, "wint8", "fp8"])
def test_split_leaves_the_routed_experts_on_the_cpu(
    tmp_path: Path, stored: str | None, quantization: str | None
) -> None:
    if stored is None:
        source = resolve_model(str(write_checkpoint(tmp_path / "it", moe_model(), pt_tensors(moe_model()))))
    else:
        write_gguf(tmp_path / "it.gguf", wide_moe(), "Q8_0")
        source = replace(resolve_model(tmp_path / "it.gguf"), default_quantization=None)
    packed = load_tensors(source, dtype=torch.bfloat16, quantization="wint4")
    with interpreted():
        found = load_tensors(source, dtype=torch.bfloat16, quantization=quantization, split="wint4")
        whole = load_tensors(source, dtype=torch.bfloat16, quantization=quantization)
    for name, weight in found.items():
        if name.endswith(ROUTED_EXPERTS):
            assert isinstance(weight, ops.PackedWeight)
            assert torch.equal(floats(weight), floats(packed[name]))
        else:
            assert type(weight) is type(whole[name])
            assert torch.equal(floats(weight), floats(whole[name])), name
    apart = [name.endswith(ROUTED_EXPERTS) for name in found]
    sizes = [sum(w.nbytes for w, routed in zip(found.values(), apart, strict=True) if routed == on) for on in (0, 1)]
    assert tuple(sizes) == split_bytes(source.config, torch.bfloat16, quantization, "wint4")


def test_a_split_network_computes_what_a_whole_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve_model(None)
    tokens = list(range(1, 40))
    whole = load_model(source, dtype=torch.float32, quantization="wint8")
    assert not whole.is_split
    expected = logits(whole, tokens)
    monkeypatch.setattr(split_experts, "are_apart", lambda *_: True)
    assert torch.equal(logits(whole, tokens), expected), "float32 sums are the same, wherever the terms come from"
    monkeypatch.undo()

    split = load_model(source, dtype=torch.float32, split="wint8")
    assert split.is_split
    assert split.quantization == "wint8"
    plain = logits(load_model(source, dtype=torch.float32), tokens)
    assert (logits(split, tokens) - plain).norm() < 0.1 * plain.norm()


def test_what_cannot_be_split_is_said(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="split is 'fp8': experts on the CPU are packed as wint4 or wint8"):
        load_tensors(resolve_model("dummy:tiny"), split="fp8")
    dense = resolve_model(str(write_checkpoint(tmp_path / "it", dense_model(), pt_tensors(dense_model()))))
    with pytest.raises(OptionError, match="no routed experts that could stay on the CPU"):
        load_tensors(dense, split="wint4")


@pytest.mark.usefixtures("gpu")
def test_the_reader_is_ahead_and_never_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "CHUNK_BYTES", 1024)
    source = resolve_model(str(write_checkpoint(tmp_path / "it", moe_model(), pt_tensors(moe_model()))))
    read, ahead = 0, []
    full = threading.Event()
    read_run, fill = staging.Staging._host_run, staging.Staging.fill

    def counted_run(*arguments: Any) -> torch.Tensor:
        nonlocal read
        run = read_run(*arguments)
        read += 1
        if read == staging.DEPTH:
            full.set()
        return run

    def counted_fill(self: staging.Staging, tensor: torch.Tensor, loads: list[staging.Load]) -> None:
        if not ahead:
            assert full.wait(10), "nothing was read before it was asked for"
        ahead.append(read - sum(taken))
        fill(self, tensor, loads)
        taken.append(sum(1 for load in loads for _ in load.runs()))

    taken: list[int] = []
    monkeypatch.setattr(staging.Staging, "_host_run", counted_run)
    monkeypatch.setattr(staging.Staging, "fill", counted_fill)
    load_tensors(source)
    assert ahead[0] == staging.DEPTH
    assert max(ahead) <= staging.DEPTH
    assert read == sum(taken) > 3 * len(ahead) > 100


@pytest.mark.usefixtures("gpu")
def test_damage_is_said_and_ends_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = pt_tensors(moe_model())
    broken = {**tensors, "model.layers.1.mlp.experts.2.down_proj.weight": torch.full((32, 24), torch.nan)}
    source = resolve_model(str(write_checkpoint(tmp_path / "nan", moe_model(), broken)))
    for quantization in ROUNDED:
        with pytest.raises(CheckpointError, match=r"layers\.1\.moe\.down holds values that are not finite"):
            load_tensors(source, quantization=quantization)
    short = resolve_model(str(write_checkpoint(tmp_path / "short", moe_model(), tensors)))

    def shrunk(*_: object) -> torch.Tensor:
        raise CheckpointError("it.safetensors has shrunk")

    monkeypatch.setattr(MappedFiles, "tensor", shrunk)
    with pytest.raises(CheckpointError, match="has shrunk"):
        load_tensors(short)
    assert "tern-reads-weights" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("quantization", ROUNDED)
def test_what_is_made_lies_beside_what_it_is_made_of(quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor made without a word about its device would be on the default one, where nothing can be computed."""
    monkeypatch.setattr(ops, "pack", reference_packed.pack)  # as for a tensor on a GPU
    stack = torch.randn(2, 40, 96, generator=torch.Generator().manual_seed(0))
    expected = round_matrices("layers.1.moe.down", (2, 40, 96), stack, quantization)
    with torch.device("meta"):
        found = round_matrices("layers.1.moe.down", (2, 40, 96), stack, quantization)
    assert torch.equal(found.floats(), expected.floats())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quantization", ROUNDED)
def test_a_head_is_rounded_in_runs(quantization: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the head and what it becomes, once more for integers, there are a few runs of rows in float32."""
    monkeypatch.setattr(ops, "pack", reference_packed.pack)  # as for a tensor on a GPU
    monkeypatch.setattr(gpu_rounding, "ROUNDED_ROWS", 64)
    monkeypatch.setattr(gpu_weights, "ROUNDED_NUMBERS", 128 * 256)
    head = torch.randn(64 * 130, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    with MemoryPeak() as peak:
        rounded = round_matrices("head", tuple(head.shape), [head], quantization)
    times = 1 if quantization in FP8_QUANTIZATIONS else 2
    assert rounded.nbytes < peak.most < times * rounded.nbytes + 6 * 128 * 256 * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("quantization", [None, *ROUNDED])
def test_on_a_gpu_the_weights_are_those_of_the_cpu(tmp_path: Path, quantization: str | None) -> None:
    model = moe_model(dtype=torch.bfloat16, hidden_size=256, moe_intermediate_size=96)
    source = resolve_model(str(write_checkpoint(tmp_path / "it", model, fused_tensors(model))))
    with interpreted():
        expected = load_tensors(source, quantization=quantization)
    found = load_tensors(source, quantization=quantization, device="cuda")
    for name, weight in found.items():
        assert type(weight) is type(expected[name])
        error = (floats(weight).cpu() - floats(expected[name])).norm()
        # the processor's kernels round to either side in the last bit
        assert error <= 1e-3 * floats(expected[name]).norm(), name
