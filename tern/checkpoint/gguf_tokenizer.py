"""The tokenizer and template in a GGUF's metadata -> the files in which checkpoints keep them. Knows no tensors.

ERNIE's tokenizer is a sentencepiece model. GGUF keeps of it what encodes: each piece's text, score and type
(`tokenizer.ggml.tokens`, `.scores`, `.token_type`) and the settings of its normaliser. From these the model is written
anew in sentencepiece's own form (sentencepiece_model.proto), so that text is encoded by sentencepiece itself. What GGUF
calls user-defined stands beside the model in a checkpoint (`added_tokens_decoder`); its piece is a place holder here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tern.errors import CheckpointError

PREFIX = "tokenizer.ggml."
MODEL = "llama"
"""What GGUF calls a sentencepiece model of pairs (BPE)."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces, the same numbers in GGUF and in sentencepiece."""
_NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelt so in the format
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
_NO_PIECE = "<no piece>"
"""Named as the begin token of a tokenizer that puts none before a text."""
_BPE = 2
"""sentencepiece's number for a model that merges pairs."""


def text_files(metadata: Mapping[str, Any], path: Path) -> dict[str, bytes]:
    """`tokenizer.model`, `tokenizer_config.json` and, if there is a template, `chat_template.jinja`, as bytes.

    Raises `CheckpointError` for a tokenizer of another kind or one that cannot be.
    """
    kind = metadata.get(f"{PREFIX}model")
    if kind != MODEL:
        raise CheckpointError(
            f"{path} has a tokenizer of the kind {str(kind)[:40]!r}: Tern reads {MODEL!r} (sentencepiece) from GGUF."
        )
    tokens = _list(metadata, "tokens", str, path)
    scores = _list(metadata, "scores", float, path, like=tokens)
    types = _list(metadata, "token_type", int, path, like=tokens)
    names = {
        name: tokens[index]
        for name, key in _NAMES.items()
        if (index := _index(metadata, key, tokens, path)) is not None
    }
    if (unknown := _index(metadata, "unknown_token_id", tokens, path)) is not None and UNKNOWN not in types:
        types = [*types[:unknown], UNKNOWN, *types[unknown + 1 :]]
    if types.count(UNKNOWN) != 1:
        raise CheckpointError(
            f"{path} has no sound tokenizer: {types.count(UNKNOWN)} of its tokens stand for the unknown, and one must."
        )
    added = {
        str(index): {"content": token, "special": False}
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == USER_DEFINED and token
    }
    config = {**names, "added_tokens_decoder": added}
    files = {
        "tokenizer.model": _sentencepiece_model(zip(tokens, scores, types, strict=True), metadata, names),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=1).encode(),
    }
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        files["chat_template.jinja"] = template.encode()
    return files


def token_id(metadata: Mapping[str, Any], key: str) -> Any:
    """What the metadata says under `tokenizer.ggml.` and this key; None if nothing."""
    return metadata.get(f"{PREFIX}{key}")


def _list(metadata: Mapping[str, Any], key: str, of: type, path: Path, *, like: list[Any] | None = None) -> list[Any]:
    values = token_id(metadata, key)
    if not isinstance(values, list) or not all(type(value) is of for value in values):
        raise CheckpointError(f"{path} has no sound tokenizer: {PREFIX}{key} is missing or no array of {of.__name__}.")
    if like is not None and len(values) != len(like):
        raise CheckpointError(
            f"{path} has no sound tokenizer: {PREFIX}{key} has {len(values)} items for {len(like)} tokens."
        )
    return values


def _index(metadata: Mapping[str, Any], key: str, tokens: list[str], path: Path) -> int | None:
    index = token_id(metadata, key)
    if index is not None and (type(index) is not int or not 0 <= index < len(tokens)):
        raise CheckpointError(
            f"{path} names {str(index)[:40]} as {PREFIX}{key}, but its tokens go from 0 to {len(tokens) - 1}."
        )
    return index


# --- sentencepiece_model.proto on the wire: each field is its number and kind, then its value -----------------------


def _sentencepiece_model(
    pieces: Iterable[tuple[str, float, int]], metadata: Mapping[str, Any], names: Mapping[str, str]
) -> bytes:
    """A ModelProto: its pieces (1), how they were trained (2) and how text is normalised (3)."""
    records: list[bytes] = []
    has_bytes = False
    for index, (piece, score, kind) in enumerate(pieces):
        has_bytes |= kind == BYTE
        if kind == USER_DEFINED:
            piece, kind = f"<added {index}>", UNUSED
        records.append(_field(1, _field(1, piece.encode()) + _number(2, score) + _number(3, kind)))
    begins = names.get("bos_token", "<s>") if token_id(metadata, "add_bos_token") is not False else _NO_PIECE
    trainer = (
        _number(3, _BPE)
        + _number(35, int(has_bytes))
        + _field(45, names.get("unk_token", "<unk>").encode())
        + _field(46, begins.encode())
        + _field(47, names.get("eos_token", "</s>").encode())
        + _field(48, names.get("pad_token", "<pad>").encode())
    )
    normaliser = (
        _field(1, b"identity")
        + _number(3, int(token_id(metadata, "add_space_prefix") is not False))
        + _number(4, int(token_id(metadata, "remove_extra_whitespaces") is True))
        + _number(5, 1)
    )
    return b"".join([*records, _field(2, trainer), _field(3, normaliser)])


def _field(number: int, content: bytes) -> bytes:
    """A text or a message."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int | float) -> bytes:
    """A whole number, or a float32."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the upper bit says that more follow. Below 0, as 64 bits."""
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
