"""A model in GGUF, one file or several parts, in the terms of a Hugging Face checkpoint. Knows keys, reads no weights.

Knows which keys say what `config.json` and `generation_config.json` say elsewhere. Tensors keep their GGUF names, which
`layouts` knows; queries and keys lie as in a checkpoint (GGUF's `ernie4_5` turns neighbouring pairs, as ERNIE does).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tern.checkpoint.block_formats import BLOCK_FORMATS
from tern.checkpoint.gguf_file import GgufFile, read_gguf
from tern.checkpoint.gguf_tokenizer import text_files, token_id
from tern.checkpoint.safetensors_file import TensorEntry
from tern.errors import CheckpointError, UnsupportedConfigError

SUFFIX = ".gguf"
ARCHITECTURES = {"ernie4_5-moe": "ernie4_5_moe", "ernie4_5": "ernie4_5"}
"""GGUF's names of the networks that Tern runs, and what `config.json` calls them."""

FLOAT_BITS = 16  # or more

_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})")
_DTYPES = {"F32": "float32", "F16": "float16"}

# What config.json calls it: the key of the metadata behind the architecture's name.
_KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_EXPERT_KEYS = {
    "moe_num_experts": "expert_count",
    "moe_k": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "moe_layer_start_index": "leading_dense_block_count",
    "moe_layer_interval": "interleave_moe_layer_step",
}
_TOKEN_KEYS = {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SAMPLING_KEYS = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "penalty_repeat"}


@dataclass(frozen=True)
class GgufModel:
    """`config`, `generation` and `text_files` are what a checkpoint's files would hold; `entries` all parts' tensors.

    `quantization` is the packing whose width is nearest to that of most weights, None if most are plain floats.
    """

    config: dict[str, Any]
    generation: dict[str, Any]
    text_files: dict[str, bytes]
    entries: tuple[TensorEntry, ...]
    quantization: str | None


def gguf_names(present: Iterable[str]) -> list[str]:
    """The GGUF models among these names of files: the files themselves, of those in parts the first."""
    names = [name for name in present if name.endswith(SUFFIX)]
    parts = {name: _PART.fullmatch(name.removesuffix(SUFFIX)) for name in names}
    return [name for name, part in parts.items() if part is None or int(part[2]) == 1]


def model_name(path: Path) -> str:
    """What a user would call the model in a file: its name without suffix and part."""
    stem = path.name.removesuffix(SUFFIX)
    part = _PART.fullmatch(stem)
    return part[1] if part else stem


def read_gguf_model(path: Path) -> GgufModel:
    """Read the headers of the file `path`, or of all the parts of which it is one.

    Raises `CheckpointError` if a part is missing or damaged, `UnsupportedConfigError` for a network of another kind.
    """
    files = [read_gguf(part) for part in _parts(path)]
    metadata = files[0].metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedConfigError(
            f"{path} holds a network of the architecture {str(architecture)[:40]!r}: "
            f"Tern runs {' and '.join(ARCHITECTURES)}."
        )
    entries = tuple(entry for file in files for entry in file.entries)
    _check_parts(path, files)
    quantization = _quantization(entries)
    config = _config(metadata, str(architecture), {entry.name: entry for entry in entries})
    config["dtype"] = "bfloat16" if quantization else _dtype(entries)
    generation = _generation(metadata)
    texts = text_files(metadata, files[0].path)
    texts["generation_config.json"] = json.dumps(generation, indent=1).encode()
    return GgufModel(config, generation, texts, entries, quantization)


def _parts(path: Path) -> list[Path]:
    """All files of the model, in order."""
    part = _PART.fullmatch(path.name.removesuffix(SUFFIX))
    if part is None:
        return [path]
    count = int(part[3])
    paths = [path.with_name(f"{part[1]}-{number:05d}-of-{count:05d}{SUFFIX}") for number in range(1, count + 1)]
    missing = [each.name for each in paths if not each.is_file()]
    if missing or not paths:
        names = ", ".join(missing[:4]) or "all parts"
        raise CheckpointError(f"{path} is one of {count} parts, but {names} is not beside it: download all of them.")
    return paths


def _check_parts(path: Path, files: Collection[GgufFile]) -> None:
    """No tensor may occur in two parts, and as many must be there as the first part announces."""
    counts = Counter(entry.name for file in files for entry in file.entries)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise CheckpointError(f"{path} has the tensor {twice[0][:100]!r} in several of its parts: download them again.")
    announced = next(iter(files)).metadata.get("split.tensors.count")
    if len(files) > 1 and type(announced) is int and announced != len(counts):
        raise CheckpointError(
            f"The {len(files)} parts of {path} hold {len(counts)} tensors and the first announces {announced}: "
            "they are not of one model, download them again."
        )


def _config(metadata: Mapping[str, Any], architecture: str, entries: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """What `config.json` would say. Values of the wrong kind are left to whoever reads it."""

    def given(keys: Mapping[str, str]) -> dict[str, Any]:
        found = {name: _short(metadata.get(f"{architecture}.{key}")) for name, key in keys.items()}
        return {name: value for name, value in found.items() if value is not None}

    config: dict[str, Any] = {"model_type": ARCHITECTURES[architecture], **given(_KEYS)}
    if architecture == "ernie4_5-moe":
        config |= {"moe_num_shared_experts": 0, **given(_EXPERT_KEYS)}
        shared = [entry for name, entry in entries.items() if name.endswith(".ffn_up_shexp.weight") and entry.shape]
        width = config.get("moe_intermediate_size")
        if shared and type(width) is int and width > 0:
            config["moe_num_shared_experts"] = shared[0].shape[0] // width
    embedding = entries.get("token_embd.weight")
    rows = embedding.shape[:1] if embedding is not None else ()
    config["vocab_size"] = rows[0] if rows else len(token_id(metadata, "tokens") or ())
    config["tie_word_embeddings"] = "output.weight" not in entries
    config["use_bias"] = "blk.0.attn_q.bias" in entries
    config |= {name: value for name, key in _TOKEN_KEYS.items() if (value := token_id(metadata, key)) is not None}
    if ends := _ends(metadata):
        config["eos_token_id"] = ends
    scaling = metadata.get(f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none"):
        config["rope_scaling"] = {"rope_type": scaling}
    turned, head = metadata.get(f"{architecture}.rope.dimension_count"), _head_dim(config)
    if type(turned) is int and head and turned != head:
        config["partial_rotary_factor"] = turned / head
    return config


def _head_dim(config: Mapping[str, Any]) -> int | None:
    """The width of a head, said or implied; None if the numbers give none."""
    given, hidden, heads = (config.get(key) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    if given is not None:
        return given if type(given) is int else None
    return hidden // heads if type(hidden) is int and type(heads) is int and heads > 0 else None


def _ends(metadata: Mapping[str, Any]) -> list[Any]:
    """The tokens that end a text: the end of a sequence, of a turn, of a message."""
    return list(dict.fromkeys(value for key in _END_KEYS if (value := token_id(metadata, key)) is not None))


def _generation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What `generation_config.json` would say."""
    values = {name: _short(metadata.get(f"general.sampling.{key}")) for name, key in _SAMPLING_KEYS.items()}
    given = {name: value for name, value in values.items() if value is not None}
    return {**given, **({"eos_token_id": ends} if (ends := _ends(metadata)) else {})}


def _short(value: Any) -> Any:
    """GGUF stores float32: the decimal number of seven digits is the one that was meant."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _dtype(entries: Iterable[TensorEntry]) -> str:
    embedding = next((entry.dtype for entry in entries if entry.name == "token_embd.weight"), "BF16")
    return _DTYPES.get(embedding, "bfloat16")


def _quantization(entries: Iterable[TensorEntry]) -> str | None:
    """4 bits if most weights have up to 5, 8 bits if they have more, None if most are floats."""
    count_of_bits: Counter[int] = Counter()
    for entry in entries:
        block = BLOCK_FORMATS.get(entry.dtype)
        count_of_bits[block.bits if block else FLOAT_BITS] += math.prod(entry.shape)
    half = count_of_bits.total() / 2
    for limit, quantization in ((5, "wint4"), (8, "wint8")):
        if sum(count for bits, count in count_of_bits.items() if bits <= limit) > half:
            return quantization
    return None
