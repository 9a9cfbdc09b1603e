"""A checkpoint's tokenizer: text to ids, ids to bytes and text.

Knows the files `tokenizer.json` (Hugging Face tokenizers) and `tokenizer.model` (sentencepiece, used only when there is
nothing else), and which tokens are control tokens. Knows nothing of messages or prompts. Incremental decoding is in
`detokenizer`; `decode` here is the same machine run once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tern.chat.config_files import TextFiles, token_text
from tern.chat.detokenizer import Detokenizer
from tern.chat.parser import PROTOCOL_TAGS
from tern.chat.vocabularies import JsonVocabulary, SentencePieceVocabulary
from tern.errors import CheckpointError, InvalidRequestError


class Vocabulary(Protocol):
    """What one kind of tokenizer file offers. Ids run from 0 to `size` - 1; gaps have no text."""

    size: int
    special_ids: frozenset[int]  # control tokens: not part of the text they frame
    strips_leading_space: bool  # the first word's space is a mark of its token, not of the text

    def encode(self, text: str, *, allow_special: bool, add_special_tokens: bool) -> list[int]: ...

    def encode_continuation(self, text: str) -> list[int]: ...

    def id_of(self, token: str) -> int | None: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Tokenizer:
    """Text to token ids and back. Thread-safe.

    `special_ids` are the control tokens. The tags of the text protocol (`<think>`, `<response>`, `<tool_call>` and
    their ends) always count as text, whatever the checkpoint says of them: the response parser reads them.
    """

    def __init__(
        self, vocabulary: Vocabulary, *, names: Mapping[str, str | None] | None = None, control: Iterable[str] = ()
    ) -> None:
        """`names` tells the text of `bos_token` and its like, `control` the control tokens that the file calls text."""
        self._vocabulary = vocabulary
        tags = {vocabulary.id_of(tag) for tag in PROTOCOL_TAGS}
        named = {name: token for name, token in (names or {}).items() if token}
        ids = {name: vocabulary.id_of(token) for name, token in named.items()}
        extra = {vocabulary.id_of(token) for token in control}
        self.special_ids = frozenset(
            i for i in {*vocabulary.special_ids, *ids.values(), *extra} - tags if i is not None
        )
        self.bos_id, self.eos_id = ids.get("bos_token"), ids.get("eos_token")
        self.bos_token, self.eos_token = named.get("bos_token"), named.get("eos_token")
        pad = ids.get("pad_token")
        self.pad_id: int = pad if pad is not None else (self.eos_id or 0)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_directory(cls, path: str | Path, given: Mapping[str, bytes] | None = None) -> Tokenizer:
        """Open the tokenizer in a checkpoint's directory, or in the files `given` in its place, by name.

        Raises `CheckpointError` when there is none that Tern reads.
        """
        files = TextFiles(Path(path), given)
        config = files.read_object("tokenizer_config.json")
        names = {key: token_text(config.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
        control = _control_tokens(config) + _control_tokens(files.read_object("special_tokens_map.json"))
        if files.has("tokenizer.json"):
            return cls(JsonVocabulary(files), names=names, control=control)
        if files.has("tokenizer.model"):
            added = _added_tokens(config, files.read_object("added_tokens.json"))
            vocabulary = SentencePieceVocabulary(files, added)
            names = {**vocabulary.names, **{k: v for k, v in names.items() if v}}
            return cls(vocabulary, names=names, control=control)
        raise CheckpointError(f"{path} has neither tokenizer.json nor tokenizer.model: text cannot be read.")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._vocabulary.size

    @property
    def strips_leading_space(self) -> bool:
        """Whether the space before a text's first word is dropped when the text is decoded whole."""
        return self._vocabulary.strips_leading_space

    def id_of(self, token: str) -> int | None:
        """The id of one token by its text, or None."""
        return self._vocabulary.id_of(token)

    def encode(self, text: str, *, allow_special: bool = True, add_special_tokens: bool = False) -> list[int]:
        """The ids of `text`.

        With `allow_special` False, control tokens spelt out in the text become ordinary text: use it for what a user
        wrote. `add_special_tokens` adds what the checkpoint puts around a text (a begin token, mostly). Raises
        `InvalidRequestError` for text that is not valid Unicode (a lone surrogate).
        """
        _check_unicode(text)
        return self._vocabulary.encode(text, allow_special=allow_special, add_special_tokens=add_special_tokens)

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of text that continues other text: a sentencepiece-like tokenizer opens a text with a space."""
        _check_unicode(text)
        return self._vocabulary.encode_continuation(text)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True, continuation: bool = False) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD.

        `continuation` says that the ids continue other text, so that the space before their first word is part of it.
        """
        stream = Detokenizer(self, skip_special_tokens=skip_special_tokens, continuation=continuation)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.finish()

    def token_text(self, token_id: int) -> str:
        """How one token reads by itself; a token that holds half a character shows U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, control tokens spelt out.

        Raises `InvalidRequestError` outside the vocabulary.
        """
        found = self._bytes.get(token_id)
        if found is None:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequestError(
                    f"Token id {token_id} is outside the vocabulary: ids run from 0 to {self.vocab_size - 1}."
                )
            found = self._bytes[token_id] = self._vocabulary.token_bytes(token_id)
        return found


def bad_word_sequences(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences that spell each word, at the start of a line and behind a space."""
    spellings = {
        tuple(tokenizer.encode_continuation(form)) for word in words for form in (word, " " + word.lstrip(" "))
    }
    return tuple(sorted(spelling for spelling in spellings if spelling))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"The text has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}: "
            "send valid Unicode."
        ) from None


def _control_tokens(config: Mapping[str, Any]) -> list[str]:
    """The tokens that a configuration names as special: `cls_token` and its like, and the additional ones."""
    values = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key)
        if isinstance(more, Mapping):
            values += more.values()
        elif isinstance(more, list):
            values += more
    return [text for value in values if (text := token_text(value))]


def _added_tokens(config: Mapping[str, Any], added: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Tokens beside a sentencepiece model: id -> (text, whether it is a control token)."""
    tokens = {index: (text, True) for text, index in added.items() if isinstance(index, int)}
    for index, entry in (config.get("added_tokens_decoder") or {}).items():
        text = token_text(entry)
        if str(index).isdigit() and text:
            tokens[int(index)] = (text, bool(entry.get("special", False)) if isinstance(entry, Mapping) else False)
    return tokens
