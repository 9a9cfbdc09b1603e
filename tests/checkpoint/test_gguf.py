"""GGUF files load to the weights that their bytes stand for, in every type, and compute what those weights compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoint_writer import dense_model, fused_tensors, moe_model, write_checkpoint
from gguf_writer import Type, finish, restore, write_gguf
from test_layouts import NETWORKS, assert_computes_the_same, assert_same, canonical, logits

from tern import LLM, SamplingParams, ops
from tern.bench import diagnose
from tern.checkpoint import load_model, load_tensors, quantise_checkpoint, resolve_model
from tern.checkpoint.block_formats import BLOCK_FORMATS, dequantise
from tern.checkpoint.gguf_file import READABLE_TYPES
from tern.engine import Engine, EngineOptions
from tern.errors import CheckpointError

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}
"""Widths of whole blocks, 256 weights at most."""


def wide_moe() -> Any:
    return moe_model(**WIDE, moe_intermediate_size=256)


def plain(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a file as floats."""
    return load_tensors(resolve_model(path), dtype=torch.float32, quantization="none")  # type: ignore[return-value]


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_any_block_becomes_the_floats_that_gguf_makes_of_it(kind: str) -> None:
    """Random bytes, infinite and undefined scales among them."""
    block = BLOCK_FORMATS[kind]
    rows = np.random.default_rng(1).integers(0, 256, (13, 7, 2 * block.nbytes), dtype=np.uint8)
    found = dequantise(torch.from_numpy(rows), block).numpy()
    assert found.shape == (13, 7, 2 * block.weights)
    expected = gguf.dequantize(rows, Type[kind])
    assert 0.5 < np.isfinite(expected).mean() < 1
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("kind", READABLE_TYPES)
def test_every_type_loads_to_what_its_bytes_stand_for(tmp_path: Path, kind: str) -> None:
    model = wide_moe()
    restore(model, write_gguf(tmp_path / "it.gguf", model, kind))
    stored = plain(tmp_path / "it.gguf")
    assert_same(stored, canonical(model))
    directory = write_checkpoint(tmp_path / "same", model, fused_tensors(model))
    network = load_model(resolve_model(tmp_path / "it.gguf"), dtype=torch.float32, quantization="none")
    same = load_model(resolve_model(directory), dtype=torch.float32)
    tokens = [1, 17, 42, 5, 90, 33]
    assert torch.equal(logits(network, tokens), logits(same, tokens))
    assert_computes_the_same(network, model)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_has_its_names(tmp_path: Path, network: str) -> None:
    model = NETWORKS[network]()
    write_gguf(tmp_path / "it.gguf", model, "F32")
    assert_same(plain(tmp_path / "it.gguf"), canonical(model))
    source = resolve_model(tmp_path / "it.gguf")
    assert source.config.architecture == ("moe" if hasattr(model.config, "moe_k") else "dense")
    assert source.config.rms_norm_eps == model.config.rms_norm_eps
    assert source.generation.eos_token_ids == {2}
    assert_computes_the_same(load_model(source), model)


def test_experts_are_turned_to_floats_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide_moe()
    restore(model, write_gguf(tmp_path / "it.gguf", model, "Q4_0"))
    sizes: list[int] = []

    def counted(rows: torch.Tensor, block: Any) -> torch.Tensor:
        floats = dequantise(rows, block)
        sizes.append(floats.numel())
        return floats

    monkeypatch.setattr("tern.checkpoint.stored_weights.RUN", 100_000)
    monkeypatch.setattr("tern.checkpoint.stored_weights.dequantise", counted)
    assert_same(plain(tmp_path / "it.gguf"), canonical(model))
    assert max(sizes) <= 100_000


@pytest.mark.parametrize(
    ("kind", "others", "expected"),
    [
        ("Q4_0", {}, "wint4"),
        ("Q5_K", {"token_embd.weight": "Q6_K"}, "wint4"),
        ("Q6_K", {}, "wint8"),
        ("Q8_0", {"token_embd.weight": "F16"}, "wint8"),
        ("BF16", {"token_embd.weight": "Q8_0"}, None),
        ("F16", {}, None),
    ],
)
def test_weights_of_few_bits_are_packed_on_the_cpu(
    tmp_path: Path, kind: str, others: dict[str, str], expected: str | None
) -> None:
    model = wide_moe()
    floats = write_gguf(tmp_path / "it.gguf", model, kind, kinds=others)
    restore(model, floats)
    source = resolve_model(tmp_path / "it.gguf")
    assert source.default_quantization == expected
    assert diagnose(source).default == (expected or "bfloat16")
    for asked in (None, "wint4", "wint8"):
        found = load_tensors(source, quantization=asked)
        for name, tensor in canonical(model).items():
            weight = found[name]
            linear = name.endswith((".weight", "moe.gate_up", "moe.down"))
            packing = asked or expected
            assert isinstance(weight, ops.PackedWeight) == (linear and packing is not None), name
            if isinstance(weight, ops.PackedWeight):
                assert weight.bits == {"wint4": 4, "wint8": 8}[str(packing)]
                again = ops.pack(tensor, weight.bits, weight.parts)
                assert torch.equal(weight.values, again.values), name
                assert torch.equal(weight.scales, again.scales), name
            elif not linear and "moe" not in name:
                assert weight.dtype == (torch.float16 if kind == "F16" else torch.bfloat16), name


def test_four_bits_packed_again_err_little_more_than_once() -> None:
    """What docs/api.md says of Q4_0 that is read as wint4 or wint8."""
    original = torch.randn(256, 2560, generator=torch.Generator().manual_seed(5))
    floats = torch.from_numpy(gguf.dequantize(gguf.quantize(original.numpy(), Type.Q4_0), Type.Q4_0).copy())

    def error(found: torch.Tensor, of: torch.Tensor) -> float:
        return float((found - of).norm() / of.norm())

    again = ops.unpack(ops.pack(floats, 4))
    assert error(floats, original) == pytest.approx(0.086, abs=0.002)
    assert error(again, floats) == pytest.approx(0.049, abs=0.002)
    assert error(again, original) == pytest.approx(0.099, abs=0.002)
    assert error(ops.unpack(ops.pack(floats, 8)), floats) == pytest.approx(0.008, abs=0.001)


def test_what_is_packed_from_a_file_is_what_loading_packs(tmp_path: Path) -> None:
    """`tern quantize FILE.gguf DST`: a whole checkpoint, with the tokenizer of the file."""
    write_gguf(tmp_path / "it.gguf", wide_moe(), "Q4_K", metadata={"tokenizer.chat_template": "{{ messages }}"})
    source = resolve_model(tmp_path / "it.gguf")
    quantise_checkpoint(source, tmp_path / "out", 4)
    written = resolve_model(tmp_path / "out")
    assert (written.config, written.generation, written.stored_bits) == (source.config, source.generation, 4)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"tokenizer.model", "chat_template.jinja"}
    assert source.text_files is not None
    for name, content in source.text_files.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    tokens = [5, 6, 7, 8]
    assert torch.equal(logits(load_model(written), tokens), logits(load_model(source), tokens))


class TestPlaces:
    """Which files make up a model, and what it is called."""

    @pytest.fixture
    def parts(self, tmp_path: Path) -> list[Path]:
        write_gguf(tmp_path / "it.gguf", wide_moe(), "Q8_0", split_max_tensors=9)
        parts = sorted(tmp_path.glob("it-*.gguf"))
        assert [part.name for part in parts[:2]] == ["it-00001-of-00003.gguf", "it-00002-of-00003.gguf"]
        return parts

    def test_any_part_names_the_whole(self, parts: list[Path], tmp_path: Path) -> None:
        write_gguf(tmp_path / "whole.gguf", wide_moe(), "Q8_0")
        for part in parts:
            source = resolve_model(part)
            assert source.name == "it"
            assert_same(plain(part), plain(tmp_path / "whole.gguf"))

    def test_a_directory_of_parts(self, parts: list[Path]) -> None:
        assert resolve_model(parts[0].parent).config == resolve_model(parts[1]).config

    def test_a_missing_part(self, parts: list[Path]) -> None:
        parts[2].unlink()
        with pytest.raises(CheckpointError, match=r"one of 3 parts, but it-00003-of-00003\.gguf is not beside it"):
            resolve_model(parts[0])

    def test_a_part_of_another_model(self, parts: list[Path]) -> None:
        parts[2].write_bytes(parts[1].read_bytes())
        with pytest.raises(CheckpointError, match="in several of its parts"):
            resolve_model(parts[0])
        writer = gguf.GGUFWriter(parts[2], "ernie4_5-moe")
        writer.add_tensor("blk.9.attn_norm.weight", np.ones(256, np.float32))
        finish(writer)
        with pytest.raises(CheckpointError, match=r"hold \d+ tensors and the first announces \d+: they are not of one"):
            resolve_model(parts[0])

    def test_a_directory_with_one_file(self, tmp_path: Path) -> None:
        write_gguf(tmp_path / "Some-F16.gguf", dense_model(), "F16")
        assert resolve_model(tmp_path).name == "Some-F16"
        (tmp_path / "Some-Q4_0.gguf").touch()
        with pytest.raises(CheckpointError, match=r"2 GGUF models \(Some-F16\.gguf, Some-Q4_0\.gguf\): give the path"):
            resolve_model(tmp_path)

    def test_a_link_is_as_good_as_the_file(self, tmp_path: Path) -> None:
        write_gguf(tmp_path / "it.gguf", dense_model(), "F16")
        (tmp_path / "it.gguf").rename(tmp_path / "blob")
        (tmp_path / "linked.gguf").symlink_to(tmp_path / "blob")
        assert resolve_model(tmp_path / "linked.gguf").name == "linked"


def test_sampling_defaults_and_ends_are_the_files_own(tmp_path: Path) -> None:
    metadata = {"general.sampling.top_k": 7, "tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.padding_token_id": 4}
    write_gguf(tmp_path / "it.gguf", dense_model(), "F16", metadata=metadata)
    source = resolve_model(tmp_path / "it.gguf")
    assert source.generation.eos_token_ids == {2, 9}
    assert source.generation.sampling_defaults() == {"top_k": 7}
    assert source.config.pad_token_id == 4


def test_it_is_a_model_like_any_other(tmp_path: Path) -> None:
    template = "{% for message in messages %}t5 {{ message.content }}{% endfor %}"
    write_gguf(tmp_path / "it.gguf", wide_moe(), "Q6_K", metadata={"tokenizer.chat_template": template})
    llm = LLM(str(tmp_path / "it.gguf"), num_kv_blocks=64, progress=False)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    (chat,) = llm.chat([{"role": "user", "content": "t7"}], params)
    (again,) = llm.generate("t5 t7", params)
    assert chat.prompt == "t5 t7"
    assert chat.outputs[0].token_ids == again.outputs[0].token_ids
    assert len(again.outputs[0].token_ids) == 4


def test_an_engine_packs_by_default_and_keeps_floats_when_asked(tmp_path: Path) -> None:
    write_gguf(tmp_path / "it.gguf", dense_model(**WIDE), "Q4_0")
    source = resolve_model(tmp_path / "it.gguf")
    for asked, packed in ((None, True), ("none", False)):
        options = EngineOptions(quantization=asked, num_kv_blocks=64)
        weights = vars(Engine.open(source, options).runner.model)
        assert ("PackedWeight" in repr(weights)) == packed
