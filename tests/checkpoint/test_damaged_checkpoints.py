"""What is wrong with a checkpoint comes as one error that lists all of it, with names, sizes and the way out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_writer import Tensors, fused_tensors, moe_model, paddle_tensors, pt_tensors, write_checkpoint
from safetensors.torch import save_file

from tern.checkpoint import load_tensors, resolve_model
from tern.checkpoint.placement import SHOWN_PARTS
from tern.checkpoint.problems import SHOWN_PER_KIND
from tern.errors import CheckpointError, UnsupportedConfigError

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


def complaint(directory: Path) -> str:
    """The text of the error that loading the checkpoint raises."""
    with pytest.raises(CheckpointError) as caught:
        load_tensors(resolve_model(str(directory)))
    return str(caught.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", moe_model(), pt_tensors(moe_model()), shards=3)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Tensors], Path]:
    return lambda tensors: write_checkpoint(tmp_path / "single", moe_model(), tensors)


def test_names_from_files_are_shown_short_and_harmless(write: Callable[[Tensors], Path]) -> None:
    tensors = pt_tensors(moe_model()) | {"\x1b[2J" + "x" * 100_000: torch.ones(1), "a\nb": torch.ones(1)}
    text = complaint(write(tensors))
    assert len(text) < 2000
    assert "\x1b" not in text
    assert "surplus: \\x1b[2Jxxx" in text
    assert "surplus: a\\nb" in text


def test_everything_is_listed_at_once(write: Callable[[Tensors], Path]) -> None:
    tensors = pt_tensors(moe_model())
    del tensors["model.norm.weight"]
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.ones(31, 32)
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].to(torch.int8)
    tensors["model.layers.7.input_layernorm.weight"] = torch.ones(32)
    tensors["model.layers.1.mlp.experts.4.down_proj.weight"] = torch.ones(32, 24)
    tensors["vision.patch"] = torch.ones(3)
    text = complaint(write(tensors))
    for line in (
        "6 problems were found",
        "surplus: vision.patch [3] is no tensor of this architecture",
        "surplus: model.layers.7.input_layernorm.weight [32] has no place in the network of config.json",
        "surplus: model.layers.1.mlp.experts.4.down_proj.weight [32, 24] has no place",
        "missing: model.norm.weight, needed for norm [32]",
        "misshapen: model.layers.1.self_attn.q_proj.weight is [31, 32] instead of [32, 32]",
        "unsupported dtype: model.layers.0.mlp.down_proj.weight is I8; weights are read from F32, F16 and BF16",
    ):
        assert line in text, line


def test_missing_parts_are_named_by_their_usual_names(write: Callable[[Tensors], Path]) -> None:
    tensors = pt_tensors(moe_model())
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    for projection in ("gate", "up", "down"):
        del tensors[f"model.layers.2.mlp.experts.3.{projection}_proj.weight"]
    text = complaint(write(tensors))
    assert "missing: model.layers.1.self_attn.v_proj.weight, needed for layers.1.attn.qkv.weight [64, 32]" in text
    both = ", ".join(f"model.layers.2.mlp.experts.3.{projection}_proj.weight" for projection in ("gate", "up"))
    assert f"missing: {both}, needed for layers.2.moe.gate_up" in text
    assert "missing: model.layers.2.mlp.experts.3.down_proj.weight, needed for layers.2.moe.down [4, 32, 24]" in text


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (fused_tensors, "model.layers.2.mlp.experts.gate_up_proj"),
        (fused_tensors, "model.layers.2.mlp.gate.moe_statics.e_score_correction_bias"),
        (paddle_tensors, "ernie.layers.2.mlp.experts.3.up_gate_proj.weight"),
        (paddle_tensors, "ernie.layers.0.self_attn.qkv_proj.weight"),
        (paddle_tensors, "ernie.norm.weight"),
        (pt_tensors, "model.layers.1.mlp.moe_statics.e_score_correction_bias"),
    ],
)
def test_what_is_missing_is_called_as_the_layout_calls_it(
    write: Callable[[Tensors], Path], layout: Callable[[torch.nn.Module], Tensors], name: str
) -> None:
    tensors = layout(moe_model())
    del tensors[name]
    text = complaint(write(tensors))
    assert "1 problem was found" in text
    assert f"missing: {name}, needed for " in text


def test_a_layer_that_is_missing_whole_is_counted(write: Callable[[Tensors], Path]) -> None:
    tensors = {name: value for name, value in pt_tensors(moe_model()).items() if ".layers.2.mlp.experts" not in name}
    assert f"and {2 * 4 - SHOWN_PARTS} more, needed for layers.2.moe.gate_up [4, 48, 32]" in complaint(write(tensors))


def test_long_lists_end_in_a_count(write: Callable[[Tensors], Path]) -> None:
    tensors = {**pt_tensors(moe_model()), **{f"extra.{number}": torch.ones(1) for number in range(50)}}
    text = complaint(write(tensors))
    assert text.count("surplus: extra.") == SHOWN_PER_KIND
    assert f"surplus: and {50 - SHOWN_PER_KIND} more" in text


def test_a_tensor_stored_in_two_layouts_is_ambiguous(write: Callable[[Tensors], Path]) -> None:
    text = complaint(write({**pt_tensors(moe_model()), **fused_tensors(moe_model())}))
    fused, single = "model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.0.down_proj.weight"
    assert f"stored twice: layers.1.moe.down comes from {single} and from {fused}; keep one" in text


def test_missing_and_truncated_shards(sharded: Path) -> None:
    first = sharded / "model-00001-of-00003.safetensors"
    size = first.stat().st_size
    first.write_bytes(first.read_bytes()[:-100])
    (sharded / SECOND).unlink()
    text = complaint(sharded)
    assert "2 problems were found" in text, "tensors of those files are not reported again, one by one"
    assert f"asks for {size} bytes and the file has {size - 100}; download it again" in text
    assert re.search(rf"missing file: {SECOND}, which holds \d+ tensors", text)


def test_index_and_shards_that_disagree(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = SECOND
    index["weight_map"]["model.layers.0.self_attn.o_proj.weight"] = SECOND
    (sharded / INDEX).write_text(json.dumps(index))
    text = complaint(sharded)
    moved = [name for name in ("model.norm.weight", "model.layers.0.self_attn.o_proj.weight") if name in text]
    assert moved
    for name in moved:
        assert f"missing: {name}, needed for " in text
        assert re.search(rf"surplus: {re.escape(name)} in model-0000[13]-of-00003\.safetensors, where {INDEX}", text)


def test_index_may_list_a_tensor_that_nobody_needs(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = SECOND
    (sharded / INDEX).write_text(json.dumps(index))
    assert "embed" in load_tensors(resolve_model(str(sharded)))


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "/etc/passwd", "sub/it.safetensors", "..\\it.safetensors", "it.bin", ".safetensors", 7],
)
def test_index_cannot_lead_outside(sharded: Path, file: object) -> None:
    save_file({"model.norm.weight": torch.ones(32)}, sharded.parent / "outside.safetensors")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"refused file: {INDEX} names" in complaint(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_unusable_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    text = complaint(sharded)
    assert "1 problem was found" in text
    assert f"damaged file: {INDEX}" in text.replace(f"{sharded}/", "")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model_state.pdparams"])
def test_pickles_are_refused_by_name_and_never_opened(tmp_path: Path, file: str) -> None:
    directory = write_checkpoint(tmp_path / "it", moe_model(), pt_tensors(moe_model()))
    (directory / "model.safetensors").unlink()
    (directory / file).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    assert f"{file} is a pickle, which can run code when it is read, and is refused" in complaint(directory)


def test_no_weights_at_all(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "it", moe_model(), pt_tensors(moe_model()))
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    assert "neither model.safetensors nor model.safetensors.index.json is there (found other.safetensors)" in complaint(
        directory
    )


def test_unreadable_and_unsupported_configs(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "it", moe_model(), pt_tensors(moe_model()))
    for content, sentence in (
        (b"{", "config.json is not valid JSON"),
        (b'{"a": "\xff"}', "config.json is not valid JSON"),
        (b"[1]", "holds list where a JSON object must stand"),
    ):
        (directory / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=sentence):
            resolve_model(str(directory))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UnsupportedConfigError, match="llama"):
        resolve_model(str(directory))
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        resolve_model(str(directory))


def test_every_problem_of_a_config_is_listed_with_its_file(tmp_path: Path) -> None:
    directory = write_checkpoint(
        tmp_path / "it", moe_model(), pt_tensors(moe_model()), hidden_act="gelu", num_hidden_layers=-1
    )
    with pytest.raises(UnsupportedConfigError) as caught:
        resolve_model(str(directory))
    assert str(directory / "config.json") in str(caught.value)
    assert len(caught.value.problems) == 2


def test_quantised_checkpoints_are_refused_by_their_method(tmp_path: Path) -> None:
    quantization = {"quant_method": "fp8", "bits": 8}
    directory = write_checkpoint(
        tmp_path / "it", moe_model(), pt_tensors(moe_model()), quantization_config=quantization
    )
    with pytest.raises(UnsupportedConfigError, match="quantised by 'fp8'"):
        resolve_model(str(directory))
