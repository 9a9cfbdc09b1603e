"""Writes one random network in every layout that a loader meets, and says what must come out.

The weights come from transformers' own model classes, so that what they compute is the reference too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, Ernie4_5Config, Ernie4_5ForCausalLM

Tensors = dict[str, torch.Tensor]

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,  # 4 heads x 8 = hidden: o_proj is square, its orientation shows in no shape
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 24,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
}


def moe_model(*, dtype: torch.dtype = torch.float32, **changes: Any) -> Ernie4_5_MoeForCausalLM:
    """A small random MoE network with a correction bias that matters."""
    torch.manual_seed(7)
    model = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**{**SIZES, **EXPERTS, **changes})).eval()
    _randomise(model)
    return model.to(dtype)


def dense_model(*, dtype: torch.dtype = torch.float32, **changes: Any) -> Ernie4_5ForCausalLM:
    """A small random dense network."""
    torch.manual_seed(7)
    model = Ernie4_5ForCausalLM(Ernie4_5Config(**{**SIZES, **changes})).eval()
    _randomise(model)
    return model.to(dtype)


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    """Give every parameter values of its own: fresh models have norms of 1, biases of 0 and all-zero routers."""
    for name, parameter in model.named_parameters():
        if "layernorm" in name or name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(0.0, 0.1)


def fused_tensors(model: torch.nn.Module) -> Tensors:
    """The layout transformers 5 has in memory; a tied head is left out."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def pt_tensors(model: torch.nn.Module) -> Tensors:
    """The PT layout: one tensor per projection and expert."""
    tensors = {}
    for name, tensor in fused_tensors(model).items():
        stem = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                tensors[f"{stem}.{expert}.gate_proj.weight"] = gate.clone()
                tensors[f"{stem}.{expert}.up_proj.weight"] = up.clone()
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                tensors[f"{stem}.{expert}.down_proj.weight"] = down.clone()
        else:
            tensors[name.replace("mlp.gate.moe_statics", "mlp.moe_statics")] = tensor
    return tensors


def paddle_tensors(model: torch.nn.Module) -> Tensors:
    """The Paddle layout: `ernie.`, fused projections, linear weights `[in, out]`."""
    pt = pt_tensors(model)
    tensors: Tensors = {}
    for name, tensor in pt.items():
        fused = {"q_proj": ("qkv_proj", "qkv"), "gate_proj": ("up_gate_proj", None)}
        stem, _, last = name.rpartition(".")
        stem, _, projection = stem.rpartition(".")
        if projection in ("k_proj", "v_proj", "up_proj"):
            continue
        parts = [tensor]
        if projection in fused:
            others = ("k_proj", "v_proj") if projection == "q_proj" else ("up_proj",)
            parts += [pt[f"{stem}.{other}.{last}"] for other in others]
            name = f"{stem}.{fused[projection][0]}.{last}"
        whole = torch.cat(parts)
        linear = whole.dim() == 2 and "embed_tokens" not in name
        if "e_score_correction_bias" not in name and linear:
            whole = whole.t().contiguous()
        tensors[name.replace("model.", "ernie.", 1)] = whole
    return tensors


def mtp_tensors(hidden: int = 32, width: int = 48, kv_width: int = 16) -> Tensors:
    """Random MTP weights in the PT layout."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "mtp_emb_norm.0.weight": (hidden,),
        "mtp_hidden_norm.0.weight": (hidden,),
        "mtp_linear_proj.0.weight": (hidden, 2 * hidden),
        "mtp_block.0.input_layernorm.weight": (hidden,),
        "mtp_block.0.post_attention_layernorm.weight": (hidden,),
        "mtp_block.0.self_attn.q_proj.weight": (hidden, hidden),
        "mtp_block.0.self_attn.k_proj.weight": (kv_width, hidden),
        "mtp_block.0.self_attn.v_proj.weight": (kv_width, hidden),
        "mtp_block.0.self_attn.o_proj.weight": (hidden, hidden),
        "mtp_block.0.mlp.gate_proj.weight": (width, hidden),
        "mtp_block.0.mlp.up_proj.weight": (width, hidden),
        "mtp_block.0.mlp.down_proj.weight": (hidden, width),
    }
    return {f"model.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_checkpoint(
    directory: Path, model: torch.nn.Module, tensors: Tensors, *, shards: int = 1, **config: Any
) -> Path:
    """Save a config.json (with the keys of `config` changed) and the tensors, in one file or in several shards."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = {**model.config.to_dict(), **config}
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    for number in range(shards):
        names = sorted(tensors)[number::shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return directory
