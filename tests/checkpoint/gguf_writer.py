"""Writes networks as GGUF files with the `gguf` package, and says which floats its own dequantiser makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from checkpoint_writer import Tensors, fused_tensors

Type = gguf.GGMLQuantizationType
SCALES = {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
"""Where a block keeps its float16 numbers, in formats that the package reads but does not write."""

_PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OTHERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "lm_head.bias": "output.bias",
}


def gguf_tensors(model: torch.nn.Module) -> Tensors:
    """The weights of a network under GGUF's names, a layer's experts stacked by projection."""
    tensors: Tensors = {}
    for name, tensor in fused_tensors(model).items():
        if name in _OTHERS:
            tensors[_OTHERS[name]] = tensor
            continue
        _, _, layer, *rest = name.split(".")
        block, inner = f"blk.{layer}", ".".join(rest)
        if inner == "mlp.experts.gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            tensors |= {f"{block}.ffn_gate_exps.weight": gate, f"{block}.ffn_up_exps.weight": up}
        elif inner == "mlp.experts.down_proj":
            tensors[f"{block}.ffn_down_exps.weight"] = tensor
        elif inner.endswith("e_score_correction_bias"):
            tensors[f"{block}.exp_probs_b.bias"] = tensor[0]
        else:
            projection, _, kind = inner.rpartition(".")
            tensors[f"{block}.{_PROJECTIONS[projection]}.{kind}"] = tensor
    return tensors


def restore(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a network the weights of a GGUF file."""
    state = {}
    for name in fused_tensors(model):
        if name in _OTHERS:
            state[name] = tensors[_OTHERS[name]]
            continue
        _, _, layer, *rest = name.split(".")
        block, inner = f"blk.{layer}", ".".join(rest)
        if inner == "mlp.experts.gate_up_proj":
            parts = [tensors[f"{block}.ffn_{part}_exps.weight"] for part in ("gate", "up")]
            state[name] = torch.cat(parts, dim=1)
        elif inner == "mlp.experts.down_proj":
            state[name] = tensors[f"{block}.ffn_down_exps.weight"]
        elif inner.endswith("e_score_correction_bias"):
            state[name] = tensors[f"{block}.exp_probs_b.bias"][None]
        else:
            projection, _, kind = inner.rpartition(".")
            state[name] = tensors[f"{block}.{_PROJECTIONS[projection]}.{kind}"]
    model.load_state_dict(state, strict=False)
    model.tie_weights()


def encode(tensor: torch.Tensor, kind: str, seed: int) -> np.ndarray:
    """The bytes of a tensor in this type; for formats that the package only reads, random bytes of sensible scales."""
    floats = tensor.float().numpy()
    if kind not in SCALES:
        return gguf.quantize(floats, Type[kind])
    weights, nbytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (floats.size // weights, nbytes), dtype=np.uint8)
    for place in SCALES[kind]:
        scales = rng.uniform(0.5, 1.0, len(blocks)) * (2e-6 if kind == "Q6_K" else 1e-4)
        blocks[:, place : place + 2] = scales.astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(*floats.shape[:-1], -1)


def write_gguf(
    path: Path,
    model: Any,
    kind: str,
    *,
    kinds: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    **options: Any,
) -> Tensors:
    """Write a network with its matrices in type `kind`, those of `kinds` in others -> its weights as dequantised.

    Norms, biases and routers are F32. `metadata` adds integers and texts, `options` are the package's for its writer.
    """
    config = model.config
    moe = hasattr(config, "moe_num_experts")
    writer = gguf.GGUFWriter(path, architecture or ("ernie4_5-moe" if moe else "ernie4_5"), **options)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if moe:
        writer.add_expert_count(config.moe_num_experts)
        writer.add_expert_used_count(config.moe_k)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_count(config.moe_num_shared_experts)
        writer.add_interleave_moe_layer_step(config.moe_layer_interval)
        writer.add_leading_dense_block_count(config.moe_layer_start_index)
    add_plain_tokenizer(writer, config.vocab_size)
    for key, value in (metadata or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key, value)
    return add_tensors(writer, model, kind, kinds or {})


def add_tensors(writer: gguf.GGUFWriter, model: Any, kind: str, kinds: Mapping[str, str]) -> Tensors:
    floats: Tensors = {}
    for number, (name, tensor) in enumerate(gguf_tensors(model).items()):
        plain = tensor.dim() == 1 or "ffn_gate_inp" in name
        here = "F32" if plain else kinds.get(name, kind)
        stored = encode(tensor, here, number)
        writer.add_tensor(name, stored, raw_dtype=Type[here])
        floats[name] = torch.from_numpy(gguf.dequantize(stored, Type[here]).copy()).view(tensor.shape)
    finish(writer)
    return floats


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_plain_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """A tokenizer of `size` pieces, for networks whose text does not matter."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(b"t%d" % i for i in range(size - 3))])
    writer.add_token_scores([-float(i) for i in range(size)])
    writer.add_token_types([2, 3, 3, *[1] * (size - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
