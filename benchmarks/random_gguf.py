"""A GGUF of random Q4_0 weights in the shape of an ERNIE-4.5 mixture, to time llama.cpp on what Tern is timed on.

    pip install gguf
    python -m benchmarks.random_gguf OUT.gguf --model dummy:ernie-4.5-21b-a3b

The names of tensors and fields are those that llama.cpp's `ernie4_5-moe` reads. The tokenizer is a stand-in: no text
can be read or written with it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np

from tern.checkpoint import resolve_model
from tern.model import ErnieConfig

GROUP, GROUP_BYTES = 32, 18
"""Q4_0: 32 weights share a float16 scale, which stands before their 16 bytes of nibbles."""
NIBBLE_STD = math.sqrt(21.5)  # of -8..7, all as likely


@dataclass(frozen=True)
class Entry:
    """A tensor of the file, [out, in] or [experts, out, in]: "q4_0", or float32 that is "normal", or ones, or zeros."""

    name: str
    shape: tuple[int, ...]
    kind: str = "q4_0"


def entries(config: ErnieConfig) -> Iterator[Entry]:
    """Every tensor, in the file's order."""
    hidden, dim = config.hidden_size, config.head_dim
    yield Entry("token_embd.weight", (config.vocab_size, hidden))
    yield Entry("output_norm.weight", (hidden,), "ones")
    for number in range(config.num_hidden_layers):
        layer = f"blk.{number}."
        yield Entry(f"{layer}attn_norm.weight", (hidden,), "ones")
        yield Entry(f"{layer}ffn_norm.weight", (hidden,), "ones")
        yield Entry(f"{layer}attn_q.weight", (config.num_attention_heads * dim, hidden))
        for name in ("k", "v"):
            yield Entry(f"{layer}attn_{name}.weight", (config.num_key_value_heads * dim, hidden))
        yield Entry(f"{layer}attn_output.weight", (hidden, config.num_attention_heads * dim))
        if not config.is_moe_layer(number):
            yield from _swiglu(layer, "", (), hidden, config.intermediate_size)
            continue
        experts, width = config.moe_num_experts, config.moe_intermediate_size
        yield Entry(f"{layer}ffn_gate_inp.weight", (experts, hidden), "normal")
        yield Entry(f"{layer}exp_probs_b.bias", (experts,), "zeros")
        yield from _swiglu(layer, "_exps", (experts,), hidden, width)
        yield from _swiglu(layer, "_shexp", (), hidden, config.moe_num_shared_experts * width)


def data(entry: Entry, draw: np.random.Generator) -> np.ndarray:
    """The tensor's values as the file holds them: uint8 for Q4_0, whose last axis is then in bytes."""
    if entry.kind == "normal":
        return draw.standard_normal(entry.shape, dtype=np.float32) / math.sqrt(entry.shape[-1])
    if entry.kind != "q4_0":
        return np.full(entry.shape, 1.0 if entry.kind == "ones" else 0.0, np.float32)
    groups = math.prod(entry.shape) // GROUP
    scale = np.full((groups, 1), 1.0 / (NIBBLE_STD * math.sqrt(entry.shape[-1])), np.float16)
    nibbles = draw.integers(0, 256, (groups, GROUP // 2), dtype=np.uint8)
    return np.concatenate([scale.view(np.uint8), nibbles], axis=1).reshape(packed_shape(entry.shape))


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor's bytes in Q4_0."""
    return (*shape[:-1], shape[-1] // GROUP * GROUP_BYTES)


def write(path: str, config: ErnieConfig) -> None:
    """Write the whole file; one tensor at a time is in memory."""
    writer = gguf.GGUFWriter(path, "ernie4_5-moe")
    _write_fields(writer, config)
    _write_tokenizer(writer, config)
    for entry in entries(config):
        if entry.kind == "q4_0":
            shape, size = packed_shape(entry.shape), math.prod(packed_shape(entry.shape))
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), size, raw_dtype=kind)
        else:
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), 4 * math.prod(entry.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    draw = np.random.default_rng(0)
    for entry in entries(config):
        writer.write_tensor_data(data(entry, draw))
    writer.close()


def _write_fields(writer: gguf.GGUFWriter, config: ErnieConfig) -> None:
    dense = sum(not config.is_moe_layer(number) for number in range(config.num_hidden_layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.moe_num_experts)
    writer.add_expert_used_count(config.moe_k)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.moe_num_shared_experts)
    writer.add_expert_shared_feed_forward_length(config.moe_num_shared_experts * config.moe_intermediate_size)
    writer.add_interleave_moe_layer_step(1)
    writer.add_leading_dense_block_count(dense)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: gguf.GGUFWriter, config: ErnieConfig) -> None:
    """Three special tokens, the bytes, and names for the rest."""
    types = gguf.TokenType
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [types.UNKNOWN, types.CONTROL, types.CONTROL, *[types.BYTE] * 256]
    more = config.vocab_size - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *(f"t{number}" for number in range(more))])
    writer.add_token_scores([-float(number) for number in range(config.vocab_size)])
    writer.add_token_types([*kinds, *[types.NORMAL] * more])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _swiglu(layer: str, suffix: str, stack: tuple[int, ...], hidden: int, width: int) -> Iterator[Entry]:
    yield Entry(f"{layer}ffn_gate{suffix}.weight", (*stack, width, hidden))
    yield Entry(f"{layer}ffn_up{suffix}.weight", (*stack, width, hidden))
    yield Entry(f"{layer}ffn_down{suffix}.weight", (*stack, hidden, width))


def main() -> None:
    """Write the file that the arguments ask for."""
    made = argparse.ArgumentParser(description="Write a GGUF of random Q4_0 weights.")
    made.add_argument("out", help="the file to write")
    made.add_argument("--model", default="dummy:ernie-4.5-21b-a3b", help="whose shape it gets: a mixture of experts")
    arguments = made.parse_args()
    config = resolve_model(arguments.model, weights=False).config
    if not config.moe_num_experts:
        made.error(f"{arguments.model} has no experts: choose a mixture")
    if config.vocab_size < 259:
        made.error(f"{arguments.model} has {config.vocab_size} tokens: 259 are needed")
    write(arguments.out, config)


if __name__ == "__main__":
    main()
