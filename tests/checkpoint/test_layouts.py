"""Every layout of the same weights loads to bit-equal tensors, which compute what transformers' own network does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_writer import (
    Tensors,
    dense_model,
    fused_tensors,
    moe_model,
    mtp_tensors,
    paddle_tensors,
    pt_tensors,
    write_checkpoint,
)

from tern.checkpoint import PRESETS, load_model, load_tensors, resolve_model
from tern.checkpoint.layouts import has_experts, match_name, name_of, parts_of
from tern.errors import CheckpointError, OptionError
from tern.model import Batch, ErnieConfig, ErnieModel, KVCache, parameter_shapes
from tests.compare import assert_close

LAYOUTS: dict[str, Callable[[torch.nn.Module], Tensors]] = {
    "pt": pt_tensors,
    "transformers": fused_tensors,
    "paddle": paddle_tensors,
}
NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    "moe": moe_model,
    "moe with biases and a head": lambda: moe_model(use_bias=True, tie_word_embeddings=False),
    "no shared experts, interval 2": lambda: moe_model(moe_num_shared_experts=0, moe_layer_interval=2),
    "dense": dense_model,
    "dense with biases and a head": lambda: dense_model(use_bias=True, tie_word_embeddings=False),
}


def canonical(model: Any) -> Tensors:
    """What must come out, written down independently of the loader from transformers' own attributes."""
    tensors = {"embed": model.model.embed_tokens.weight, "norm": model.model.norm.weight}
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        here: dict[str, Any] = {
            "attn_norm": layer.input_layernorm.weight,
            "mlp_norm": layer.post_attention_layernorm.weight,
            "attn.qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
            "attn.o": [attention.o_proj],
        }
        if hasattr(mlp, "experts"):
            here["moe.router"] = mlp.gate.weight
            here["moe.correction_bias"] = mlp.gate.moe_statics.e_score_correction_bias[0]
            here["moe.gate_up"], here["moe.down"] = mlp.experts.gate_up_proj, mlp.experts.down_proj
            if model.config.moe_num_shared_experts:
                here["moe.shared.gate_up"] = [mlp.shared_experts.gate_proj, mlp.shared_experts.up_proj]
                here["moe.shared.down"] = [mlp.shared_experts.down_proj]
        else:
            here |= {"mlp.gate_up": [mlp.gate_proj, mlp.up_proj], "mlp.down": [mlp.down_proj]}
        for name, value in here.items():
            if not isinstance(value, list):
                tensors[f"layers.{number}.{name}"] = value
                continue
            tensors[f"layers.{number}.{name}.weight"] = torch.cat([linear.weight for linear in value])
            if value[0].bias is not None:
                tensors[f"layers.{number}.{name}.bias"] = torch.cat([linear.bias for linear in value])
    if not model.config.tie_word_embeddings:
        tensors["head"] = model.lm_head.weight
    if model.lm_head.bias is not None:
        tensors["head.bias"] = model.lm_head.bias
    return {name: tensor.detach() for name, tensor in tensors.items()}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def logits(model: ErnieModel, token_ids: list[int]) -> torch.Tensor:
    """One prefill of one sequence -> logits of every position, [tokens, vocab]."""
    count = len(token_ids)
    kv = KVCache.allocate(model.config, num_blocks=count, block_size=4, dtype=model.dtype, device=model.device)
    positions = torch.arange(count)
    batch = Batch(
        token_ids=torch.tensor(token_ids),
        positions=positions,
        slots=positions,
        query_starts=torch.tensor([0, count]),
        context_lens=torch.tensor([count]),
        block_tables=torch.arange(-(-count // 4)).unsqueeze(0),
        logit_rows=positions,
        max_query_len=count,
        max_context_len=count,
    )
    return model.logits(model.hidden(batch, kv))


def assert_computes_the_same(model: ErnieModel, reference: Any) -> None:
    tokens = [1, 17, 42, 5, 90, 33, 8, 8, 61]
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0].float()
    assert_close(logits(model, tokens), expected, tolerance=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_loads_bit_equal(tmp_path: Path, layout: str, network: str) -> None:
    model = NETWORKS[network]()
    source = resolve_model(str(write_checkpoint(tmp_path / "it", model, LAYOUTS[layout](model))))
    assert_same(load_tensors(source), canonical(model))
    assert list(load_tensors(source)) == list(parameter_shapes(source.config))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_load_bit_equal(tmp_path: Path, layout: str) -> None:
    model = moe_model()
    directory = write_checkpoint(tmp_path / "it", model, LAYOUTS[layout](model), shards=5)
    assert_same(load_tensors(resolve_model(str(directory))), canonical(model))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("shard_size", ["20KB", "5GB"])
def test_what_transformers_saves_loads_and_computes_the_same(tmp_path: Path, network: str, shard_size: str) -> None:
    model: Any = NETWORKS[network]()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    source = resolve_model(str(tmp_path))
    assert_same(load_tensors(source), canonical(model))
    assert_computes_the_same(load_model(source), model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loaded_network_computes_what_transformers_does(tmp_path: Path, layout: str) -> None:
    model = moe_model(use_bias=True, tie_word_embeddings=False)
    source = resolve_model(str(write_checkpoint(tmp_path / "it", model, LAYOUTS[layout](model))))
    assert_computes_the_same(load_model(source), model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_keeps_the_routers_in_float32(tmp_path: Path, layout: str) -> None:
    model = moe_model()
    directory = write_checkpoint(tmp_path / "it", model, LAYOUTS[layout](model))
    expected = canonical(model)
    for dtype in (torch.bfloat16, torch.float16):
        for name, tensor in load_tensors(resolve_model(str(directory)), dtype=dtype).items():
            wanted = torch.float32 if name.endswith(("router", "correction_bias")) else dtype
            assert tensor.dtype == wanted
            assert torch.equal(tensor, expected[name].to(wanted)), name


def test_paddle_calls_bfloat16_u16(tmp_path: Path) -> None:
    model = moe_model()
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in paddle_tensors(model).items()}
    named_u16 = {name: tensor.contiguous().view(torch.uint16) for name, tensor in tensors.items()}
    expected = load_tensors(resolve_model(str(write_checkpoint(tmp_path / "bf16", model, tensors, dtype="bfloat16"))))
    found = load_tensors(resolve_model(str(write_checkpoint(tmp_path / "u16", model, named_u16, dtype="bfloat16"))))
    assert found["embed"].dtype == torch.bfloat16
    assert_same(found, expected)


def test_dtype_comes_from_the_config_and_else_from_the_files(tmp_path: Path) -> None:
    tensors = {name: tensor.to(torch.float16) for name, tensor in pt_tensors(moe_model()).items()}
    declared = write_checkpoint(tmp_path / "declared", moe_model(), tensors, dtype="bfloat16")
    silent = write_checkpoint(tmp_path / "silent", moe_model(), tensors, dtype=None, torch_dtype=None)
    assert load_model(resolve_model(str(declared))).dtype == torch.bfloat16
    assert load_model(resolve_model(str(silent))).dtype == torch.float16
    with pytest.raises(OptionError, match=r"dtype is torch\.int8"):
        load_model(resolve_model(str(silent)), dtype=torch.int8)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_correction_bias_with_one_or_two_dimensions(tmp_path: Path, dimensions: int) -> None:
    tensors = pt_tensors(moe_model())
    for name in [name for name in tensors if "e_score_correction_bias" in name]:
        tensors[name] = tensors[name].reshape((1, 4) if dimensions == 2 else (4,))
    directory = write_checkpoint(tmp_path / "it", moe_model(), tensors)
    assert_same(load_tensors(resolve_model(str(directory))), canonical(moe_model()))


def test_head_beside_tied_embeddings_is_ignored(tmp_path: Path) -> None:
    tensors = {**pt_tensors(moe_model()), "lm_head.weight": torch.zeros(96, 32)}
    directory = write_checkpoint(tmp_path / "it", moe_model(), tensors)
    assert_same(load_tensors(resolve_model(str(directory))), canonical(moe_model()))


def test_rotary_buffers_of_older_tools_are_ignored(tmp_path: Path) -> None:
    buffers = {
        "model.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    directory = write_checkpoint(tmp_path / "it", moe_model(), {**pt_tensors(moe_model()), **buffers})
    assert_same(load_tensors(resolve_model(str(directory))), canonical(moe_model()))


class TestMTP:
    """MTP weights: loaded when config and files have them, passed over in silence when only one of them does."""

    def test_loads_in_both_namings(self, tmp_path: Path) -> None:
        mtp = mtp_tensors()
        pt = write_checkpoint(
            tmp_path / "pt", moe_model(), {**pt_tensors(moe_model()), **mtp}, num_nextn_predict_layers=1
        )
        paddle = {
            name.replace("model.", "ernie."): tensor.t() if tensor.dim() == 2 else tensor
            for name, tensor in mtp.items()
            if not any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
        }
        block = "mtp_block.0"
        for fused, parts in (("self_attn.qkv", "qkv"), ("mlp.up_gate", ("gate", "up"))):
            stem = fused.partition(".")[0]
            whole = torch.cat([mtp[f"model.{block}.{stem}.{part}_proj.weight"] for part in parts])
            paddle[f"ernie.{block}.{fused}_proj.weight"] = whole.t()
        paddle_directory = write_checkpoint(
            tmp_path / "paddle", moe_model(), {**paddle_tensors(moe_model()), **paddle}, num_nextn_predict_layers=1
        )
        found = load_tensors(resolve_model(str(pt)))
        assert_same(load_tensors(resolve_model(str(paddle_directory))), found)
        assert torch.equal(found["mtp.proj.weight"], mtp["model.mtp_linear_proj.0.weight"])
        assert torch.equal(found["mtp.emb_norm"], mtp["model.mtp_emb_norm.0.weight"])
        assert torch.equal(found["mtp.block.attn.qkv.weight"][32:48], mtp[f"model.{block}.self_attn.k_proj.weight"])
        assert torch.equal(found["mtp.block.mlp.gate_up.weight"][48:], mtp[f"model.{block}.mlp.up_proj.weight"])
        assert load_model(resolve_model(str(pt))).mtp is not None

    def test_projection_may_have_a_bias(self, tmp_path: Path) -> None:
        bias = {"model.mtp_linear_proj.0.bias": torch.ones(32)}
        tensors = {**pt_tensors(moe_model()), **mtp_tensors(), **bias}
        directory = write_checkpoint(tmp_path / "it", moe_model(), tensors, num_nextn_predict_layers=1)
        assert torch.equal(load_tensors(resolve_model(str(directory)))["mtp.proj.bias"], torch.ones(32))

    def test_absent_though_announced(self, tmp_path: Path) -> None:
        directory = write_checkpoint(tmp_path / "it", moe_model(), pt_tensors(moe_model()), num_nextn_predict_layers=1)
        model = load_model(resolve_model(str(directory)))
        assert model.mtp is None

    def test_present_though_not_announced(self, tmp_path: Path) -> None:
        tensors = {**pt_tensors(moe_model()), **mtp_tensors()}
        directory = write_checkpoint(tmp_path / "it", moe_model(), tensors, num_nextn_predict_layers=0)
        assert_same(load_tensors(resolve_model(str(directory))), canonical(moe_model()))

    def test_half_present_is_an_error(self, tmp_path: Path) -> None:
        tensors = {**pt_tensors(moe_model()), **mtp_tensors()}
        del tensors["model.mtp_block.0.mlp.up_proj.weight"]
        directory = write_checkpoint(tmp_path / "it", moe_model(), tensors, num_nextn_predict_layers=1)
        with pytest.raises(CheckpointError, match=r"missing: model\.mtp_block\.0\.mlp\.up_proj\.weight"):
            load_tensors(resolve_model(str(directory)))


class TestOrientation:
    """Which way linear weights lie is a property of the checkpoint, shown by those that are not square."""

    def test_names_of_one_layout_with_the_orientation_of_the_other(self, tmp_path: Path) -> None:
        """Square weights (o_proj, q_proj here) follow the others even under the prefix `model.`."""
        lying = {
            name: tensor.t() if tensor.dim() == 2 and not any(x in name for x in ("embed", "e_score")) else tensor
            for name, tensor in pt_tensors(moe_model()).items()
        }
        directory = write_checkpoint(tmp_path / "it", moe_model(), lying)
        assert_same(load_tensors(resolve_model(str(directory))), canonical(moe_model()))

    def test_one_weight_against_the_others_is_misshapen(self, tmp_path: Path) -> None:
        tensors = paddle_tensors(moe_model())
        name = "ernie.layers.0.mlp.down_proj.weight"
        tensors[name] = tensors[name].t()
        directory = write_checkpoint(tmp_path / "it", moe_model(), tensors)
        with pytest.raises(
            CheckpointError, match=r"down_proj\.weight is \[32, 48\] instead of \[48, 32\] \(transposed"
        ):
            load_tensors(resolve_model(str(directory)))

    def test_fused_qkv_without_grouped_heads_is_refused(self, tmp_path: Path) -> None:
        model = moe_model(num_key_value_heads=4)
        directory = write_checkpoint(tmp_path / "it", model, paddle_tensors(model))
        with pytest.raises(CheckpointError, match=r"unsupported layout: .*qkv_proj"):
            load_tensors(resolve_model(str(directory)))
        pt = write_checkpoint(tmp_path / "pt", model, pt_tensors(model))
        assert_same(load_tensors(resolve_model(str(pt))), canonical(model))


@pytest.mark.parametrize("preset", ["ernie-4.5-21b-a3b", "ernie-4.5-0.3b"])
def test_every_parameter_has_a_name_in_files_that_leads_back_to_it(preset: str) -> None:
    config = ErnieConfig.from_dict({**PRESETS[preset], "num_nextn_predict_layers": 1, "use_bias": True})
    for target, shape in parameter_shapes(config).items():
        for part in parts_of(target):
            expert = shape[0] - 1 if has_experts(target) else None
            match = match_name(name_of(target, part, expert, known=frozenset(), prefix="model."))
            assert match is not None
            assert (match.target, match.rule.part, match.expert) == (target, part, expert)


@pytest.mark.parametrize("preset", ["ernie-4.5-21b-a3b", "ernie-4.5-0.3b"])
def test_every_parameter_has_a_name_in_gguf_that_leads_back_to_it(preset: str) -> None:
    config = ErnieConfig.from_dict({**PRESETS[preset], "use_bias": True, "tie_word_embeddings": False})
    for target in parameter_shapes(config):
        for part in parts_of(target):
            name = name_of(target, part, 3, known=frozenset(), prefix="model.", gguf=True)
            assert name.startswith(("blk.", "output", "token_embd."))
            match = match_name(name)
            assert match is not None
            assert (match.target, match.rule.part, match.expert) == (target, part, None)


class TestMemory:
    """Tensors that are canonical in the file are used where they are mapped, and no second copy is ever made."""

    @pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")
    def test_loading_fits_beside_the_mapped_file_with_little_to_spare(self, tmp_path: Path) -> None:
        """80 MB of experts, one by one in the file, under a limit that fits the file, one model and 30 MB.

        RLIMIT_DATA counts all that a process may write to: its own memory, and private mappings of files in full.
        """
        model = moe_model(num_hidden_layers=2, moe_num_experts=32, hidden_size=256, moe_intermediate_size=800)
        directory = write_checkpoint(tmp_path / "it", model, pt_tensors(model))
        size = (directory / "model.safetensors").stat().st_size
        assert size > 70e6
        program = (
            "import resource, sys\n"
            "from tern.checkpoint import load_tensors, resolve_model\n"
            "source = resolve_model(sys.argv[1])\n"
            "status = dict(line.split(':') for line in open('/proc/self/status'))\n"
            "limit = int(status['VmData'].split()[0]) * 1024 + int(sys.argv[2])\n"
            "resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))\n"
            "print(sum(tensor.nbytes for tensor in load_tensors(source).values()))\n"
        )

        def load(beside: int) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", program, str(directory), str(beside)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

        done = load(2 * size + 30_000_000)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) > 70e6
        assert "allocate memory" in load(2 * size - 30_000_000).stderr, "the limit does limit"

    def test_canonical_tensors_share_the_mapping(self, tmp_path: Path) -> None:
        directory = write_checkpoint(tmp_path / "it", moe_model(), fused_tensors(moe_model()))
        tensors = load_tensors(resolve_model(str(directory)))
        mapped = tensors["embed"].untyped_storage().data_ptr()
        size = (directory / "model.safetensors").stat().st_size
        mapped_names = {name for name, tensor in tensors.items() if mapped <= tensor.data_ptr() < mapped + size}
        assert {"norm", "layers.1.moe.gate_up", "layers.1.moe.down", "layers.1.attn.o.weight"} <= mapped_names
        assert "layers.1.attn.qkv.weight" not in mapped_names

    def test_writing_to_a_tensor_leaves_the_file_alone(self, tmp_path: Path) -> None:
        directory = write_checkpoint(tmp_path / "it", moe_model(), fused_tensors(moe_model()))
        before = (directory / "model.safetensors").read_bytes()
        load_tensors(resolve_model(str(directory)))["embed"].zero_()
        assert (directory / "model.safetensors").read_bytes() == before
