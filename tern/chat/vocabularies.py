"""The two kinds of tokenizer file: `tokenizer.json` and sentencepiece's `tokenizer.model`.

Knows how each encodes text and which bytes each of its tokens stands for. Knows nothing of sequences or chats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from typing import Any

import tokenizers

from tern.chat.config_files import TextFiles
from tern.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_META_SPACE = "▁"
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""`normalizer_spec { add_dummy_prefix: false }` on the wire: appended to a model's bytes, protobuf merges it in. Text
behind an added token must not get the space that opens a text.
"""


def byte_alphabet() -> dict[str, int]:
    """The characters in which byte-level BPE writes bytes (GPT-2, Radford et al. 2019): printable Latin-1 as itself,
    the other bytes as the code points from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class JsonVocabulary:
    """`tokenizer.json`, byte-level or sentencepiece-like, through Hugging Face's tokenizers."""

    def __init__(self, files: TextFiles) -> None:
        path, text = files.path("tokenizer.json"), files.read_text("tokenizer.json")
        try:
            raw = json.loads(text)
            self._encoder = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception for every fault of a file
            raise CheckpointError(f"{path} is not a tokenizer that can be read ({error}): download it again.") from None
        self._encoder.no_truncation()
        self._encoder.no_padding()
        kinds = list(_decoder_kinds(raw.get("decoder")))
        unknown = [kind for kind, _ in kinds if kind not in _DECODERS]
        if unknown or not kinds:
            raise CheckpointError(
                f"{path} decodes with {', '.join(unknown) or 'nothing'}: Tern reads {', '.join(sorted(_DECODERS))}."
            )
        self._alphabet = byte_alphabet() if any(kind == "ByteLevel" for kind, _ in kinds) else None
        self._added = {token["id"]: token["content"] for token in raw.get("added_tokens") or []}
        self.strips_leading_space = any(_strips(kind, options) for kind, options in kinds)
        self.special_ids = frozenset(token["id"] for token in raw.get("added_tokens") or [] if token.get("special"))
        self.size = max(chain(self._encoder.get_vocab(with_added_tokens=True).values(), [-1])) + 1

    @cached_property
    def _plain_encoder(self) -> tokenizers.Tokenizer:
        """The same, reading control tokens as text."""
        encoder = tokenizers.Tokenizer.from_str(self._encoder.to_str())
        encoder.encode_special_tokens = True
        return encoder

    def encode(self, text: str, *, allow_special: bool, add_special_tokens: bool) -> list[int]:
        """The ids of `text`."""
        encoder = self._encoder if allow_special else self._plain_encoder
        # Of the library's calls only the batched ones let other threads run meanwhile.
        (encoding,) = encoder.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of text that stands behind other text: an added token in front keeps the opening space away."""
        if not self.strips_leading_space or not self._added:
            return self.encode(text, allow_special=True, add_special_tokens=False)
        anchor = next(iter(self._added.values()))
        return self.encode(anchor + text, allow_special=True, add_special_tokens=False)[1:]

    def id_of(self, token: str) -> int | None:
        """The id of one token by its text."""
        found: int | None = self._encoder.token_to_id(token)
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; none for an id that the file leaves out."""
        if token_id in self._added:
            return str(self._added[token_id]).encode()
        token = self._encoder.id_to_token(token_id)
        if token is None:
            return b""
        if self._alphabet is not None:
            if all(char in self._alphabet for char in token):
                return bytes(self._alphabet[char] for char in token)
            return str(token).encode()
        return _piece_bytes(token)


class SentencePieceVocabulary:
    """`tokenizer.model`, with the tokens that the configuration adds to it."""

    def __init__(self, files: TextFiles, added: Mapping[int, tuple[str, bool]]) -> None:
        import sentencepiece

        path, proto = files.path("tokenizer.model"), files.read("tokenizer.model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=proto + _NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise CheckpointError(f"{path} is not a sentencepiece model ({error}): download it again.") from None
        model = self._model
        control = {i for i in range(model.piece_size()) if model.is_control(i) or model.is_unknown(i)}
        self._added = {index: text for index, (text, _) in added.items()}
        self._ids = {text: index for index, text in self._added.items()}
        for index in control:
            self._ids.setdefault(model.id_to_piece(index), index)
        self.special_ids = frozenset(control | {index for index, (_, special) in added.items() if special})
        self.size = max(model.piece_size(), max(self._added, default=-1) + 1)
        first = str(model.id_to_piece(model.encode("a")[0]))
        self.strips_leading_space = first.startswith(_META_SPACE)
        self.names = {
            name: model.id_to_piece(index)
            for name, index in (
                ("bos_token", model.bos_id()),
                ("eos_token", model.eos_id()),
                ("pad_token", model.pad_id()),
            )
            if index >= 0
        }
        self._splitter = _splitter(self._ids)
        self._plain_splitter = _splitter({t: i for t, i in self._ids.items() if i not in self.special_ids})

    def encode(self, text: str, *, allow_special: bool, add_special_tokens: bool) -> list[int]:
        """The ids of `text`: added tokens are cut out first, the model encodes what stands between them."""
        bos = self._model.bos_id()
        ids = [bos] if add_special_tokens and bos >= 0 else []
        return ids + self._encode(text, self._splitter if allow_special else self._plain_splitter, self._model)

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of text that stands behind other text: without the space that opens a text."""
        return self._encode(text, self._splitter, self._inner)

    def _encode(self, text: str, splitter: re.Pattern[str] | None, first: Any) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(splitter.split(text) if splitter is not None else [text]):
            if number % 2:
                ids.append(self._ids[part])
            elif part:
                ids += (self._inner if number else first).encode(part)
        return ids

    def id_of(self, token: str) -> int | None:
        """The id of one token by its text."""
        if token in self._ids:
            return self._ids[token]
        index = self._model.piece_to_id(token)
        return None if index == self._model.unk_id() else int(index)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; none for an id that the files leave out."""
        if token_id in self._added:
            return self._added[token_id].encode()
        if token_id >= self._model.piece_size():
            return b""
        return _piece_bytes(self._model.id_to_piece(token_id))


_DECODERS = frozenset({"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"})


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> list[tuple[str, Mapping[str, Any]]]:
    """The steps of a `decoder` entry, sequences laid flat."""
    if not decoder:
        return []
    if decoder.get("type") == "Sequence":
        return [kind for step in decoder.get("decoders", ()) for kind in _decoder_kinds(step)]
    return [(str(decoder.get("type")), decoder)]


def _strips(kind: str, options: Mapping[str, Any]) -> bool:
    if kind == "Metaspace":
        return bool(options.get("prepend_scheme", "always") != "never")
    return kind == "Strip" and options.get("content") == " " and bool(options.get("start"))


def _piece_bytes(piece: str) -> bytes:
    """The bytes of a sentencepiece piece: `<0xE4>` is a byte, `▁` a space."""
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte.group(1), 16)]) if byte else piece.replace(_META_SPACE, " ").encode()


def _splitter(tokens: Mapping[str, int]) -> re.Pattern[str] | None:
    """Cuts text at these tokens, the longest first where several fit."""
    if not tokens:
        return None
    return re.compile("(" + "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) + ")")
