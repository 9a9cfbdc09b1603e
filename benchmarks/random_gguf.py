"""A GGUF of random Q4_0 weights in the shape of an ERNIE-4.5 mixture, to time llama.cpp on what Tern is timed on.

    python -m benchmarks.random_gguf OUT.gguf --model dummy:ernie-4.5-21b-a3b

The names of tensors and fields are those that llama.cpp's `ernie4_5-moe` reads. The tokenizer is a stand-in: no text
can be read or written with it.
"""

from __future__ import annotations

import argparse
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tern.checkpoint import resolve_model
from tern.model import ErnieConfig

GROUP, GROUP_BYTES = 32, 18
"""Q4_0: 32 weights share a float16 scale, which stands before their 16 bytes of nibbles."""
F32, Q4_0 = 0, 2
ARCHITECTURE = "ernie4_5-moe"
Value = str | int | float | Sequence[str] | Sequence[float] | Sequence[int]
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


def write(path: Path, config: ErnieConfig) -> None:
    """Write the whole file, version 3 of the format; one tensor at a time is in memory."""
    found, where = list(entries(config)), 0
    fields = _fields(config)
    draw = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(found), len(fields)))
        for key, value in fields.items():
            file.write(_text(key) + _value(value))
        for entry in found:
            q4 = entry.kind == "q4_0"
            sizes = entry.shape[::-1]  # the innermost first
            file.write(_text(entry.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
            file.write(struct.pack("<IQ", Q4_0 if q4 else F32, where))
            where += _padded(math.prod(packed_shape(entry.shape)) if q4 else 4 * math.prod(entry.shape))
        file.seek(_padded(file.tell()))
        for entry in found:
            file.write(data(entry, draw).tobytes())
            file.seek(_padded(file.tell()))
        file.truncate()


def _fields(config: ErnieConfig) -> dict[str, Value]:
    """What the file says of the network, and a tokenizer: three special tokens, the bytes, and names for the rest."""
    dense = sum(not config.is_moe_layer(number) for number in range(config.num_hidden_layers))
    network: dict[str, Value] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "expert_count": config.moe_num_experts,
        "expert_used_count": config.moe_k,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.moe_num_shared_experts,
        "expert_shared_feed_forward_length": config.moe_num_shared_experts * config.moe_intermediate_size,
        "interleave_moe_layer_step": 1,
        "leading_dense_block_count": dense,
        "vocab_size": config.vocab_size,
    }
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    more = config.vocab_size - len(names)
    return {
        "general.architecture": ARCHITECTURE,
        **{f"{ARCHITECTURE}.{key}": value for key, value in network.items()},
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*names, *(f"t{number}" for number in range(more))],
        "tokenizer.ggml.scores": [-float(number) for number in range(config.vocab_size)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * more],  # unknown, control, bytes, normal
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _value(value: Value) -> bytes:
    """A field's type and value."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    kind = {str: 8, float: 6, int: 5}[type(value[0])]
    parts = [_text(each) if isinstance(each, str) else struct.pack("<f" if kind == 6 else "<i", each) for each in value]
    return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(parts)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _padded(size: int) -> int:
    """The next multiple of the format's alignment."""
    return -(-size // 32) * 32


def _swiglu(layer: str, suffix: str, stack: tuple[int, ...], hidden: int, width: int) -> Iterator[Entry]:
    yield Entry(f"{layer}ffn_gate{suffix}.weight", (*stack, width, hidden))
    yield Entry(f"{layer}ffn_up{suffix}.weight", (*stack, width, hidden))
    yield Entry(f"{layer}ffn_down{suffix}.weight", (*stack, hidden, width))


def main() -> None:
    """Write the file that the arguments ask for."""
    made = argparse.ArgumentParser(description="Write a GGUF of random Q4_0 weights.")
    made.add_argument("out", type=Path, help="the file to write")
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
