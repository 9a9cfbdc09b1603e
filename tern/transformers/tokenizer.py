"""A checkpoint's tokenizer and chat template behind the methods of transformers' tokenizers.

Knows padding and encodings; the text protocol is `tern.chat`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from tern.chat import ChatTemplate, Tokenizer
from tern.errors import InvalidRequestError

TokenIds = list[int]
Conversation = Sequence[Mapping[str, Any]]


class BatchEncoding(dict[str, Any]):
    """What a tokenizer call returns: a dict whose entries are attributes too, movable with `.to(device)`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this encoding has no {name!r}, only {sorted(self)}") from None

    def to(self, device: torch.device | str) -> BatchEncoding:
        """The same encoding with its tensors on `device`."""
        moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in self.items()}
        return BatchEncoding(moved)


class TernTokenizer:
    """A checkpoint's tokenizer and chat template behind transformers' tokenizer methods.

    `padding_side` is "left", where generation needs it, or "right".
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, *, padding_side: str = "left") -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.padding_side = padding_side

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text."""
        return self._tokenizer.eos_id

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text."""
        return self._tokenizer.bos_id

    @property
    def pad_token_id(self) -> int:
        """The id that fills up shorter rows of a batch."""
        return self._tokenizer.pad_id

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text."""
        return self._text_of(self.eos_token_id)

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text."""
        return self._text_of(self.bos_token_id)

    @property
    def pad_token(self) -> str | None:
        """The token that fills up shorter rows of a batch."""
        return self._text_of(self.pad_token_id)

    def __len__(self) -> int:
        return self._tokenizer.vocab_size

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        return_tensors: str | None = None,
        padding: bool | str = False,
        add_special_tokens: bool = True,
    ) -> BatchEncoding:
        """Encode one text or several.

        With `return_tensors="pt"`, `input_ids` and `attention_mask` are int64 [texts, tokens], padded on
        `padding_side`; without, they are lists. Texts of different lengths need `padding=True` to become a tensor.
        `add_special_tokens` adds what the checkpoint puts around a text, often nothing.
        """
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self._row(each, add_special_tokens) for each in texts]
        if return_tensors is None and not padding:
            flat = isinstance(text, str)
            masks = [[1] * len(row) for row in rows]
            return BatchEncoding(input_ids=rows[0] if flat else rows, attention_mask=masks[0] if flat else masks)
        return self._padded(rows, return_tensors, padding=bool(padding))

    def encode(
        self, text: str, *, add_special_tokens: bool = True, return_tensors: str | None = None
    ) -> TokenIds | torch.Tensor:
        """The token ids of one text, with what the checkpoint puts around it unless `add_special_tokens` is False.

        With `return_tensors="pt"` they are int64 [1, tokens].
        """
        row = self._row(text, add_special_tokens)
        if return_tensors is None:
            return row
        ids: torch.Tensor = self._padded([row], return_tensors, padding=False)["input_ids"]
        return ids

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """The id of a token, or of each of several; None for text that is no token."""
        if isinstance(tokens, str):
            return self._tokenizer.id_of(tokens)
        return [self._tokenizer.id_of(token) for token in tokens]

    def decode(self, token_ids: int | Sequence[int] | torch.Tensor, *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        ids = torch.as_tensor(token_ids).reshape(-1).tolist()
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Sequence[Sequence[int]] | torch.Tensor, *, skip_special_tokens: bool = False
    ) -> list[str]:
        """The text of each row."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in sequences]

    def apply_chat_template(
        self,
        conversation: Conversation | Sequence[Conversation],
        tools: list[dict[str, Any]] | None = None,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        padding: bool | str = False,
        return_tensors: str | None = None,
        return_dict: bool = True,
        **template_kwargs: Any,
    ) -> str | list[str] | TokenIds | list[TokenIds] | torch.Tensor | BatchEncoding:
        """Render one conversation or several: as text if not `tokenize`, else as ids or an encoding, as in a call."""
        many = bool(conversation) and not isinstance(conversation[0], Mapping)
        texts = [
            self._template.render(
                each,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                template_kwargs=template_kwargs or None,
                ids_required=False,
            )
            for each in cast(Sequence[Conversation], conversation if many else [conversation])
        ]
        if not tokenize:
            return texts if many else texts[0]
        encoding = self(
            texts if many or return_tensors or padding else texts[0],
            return_tensors=return_tensors,
            padding=padding,
            add_special_tokens=False,
        )
        if return_dict:
            return encoding
        ids: TokenIds | list[TokenIds] | torch.Tensor = encoding["input_ids"]
        return ids

    def _row(self, text: str, add_special_tokens: bool) -> TokenIds:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _text_of(self, token_id: int | None) -> str | None:
        return None if token_id is None else self._tokenizer.token_text(token_id)

    def _padded(self, rows: list[TokenIds], return_tensors: str | None, *, padding: bool) -> BatchEncoding:
        width = max(map(len, rows), default=0)
        if not padding and any(len(row) != width for row in rows):
            raise InvalidRequestError(
                f"The {len(rows)} texts have different lengths (up to {width} tokens): pass padding=True.", param="text"
            )
        ids = [self._filled(row, self.pad_token_id, width) for row in rows]
        masks = [self._filled([1] * len(row), 0, width) for row in rows]
        if return_tensors is None:
            return BatchEncoding(input_ids=ids, attention_mask=masks)
        if return_tensors != "pt":
            raise InvalidRequestError(
                f"return_tensors is {return_tensors!r}: only 'pt' is served.", param="return_tensors"
            )
        return BatchEncoding(
            input_ids=torch.tensor(ids, dtype=torch.int64), attention_mask=torch.tensor(masks, dtype=torch.int64)
        )

    def _filled(self, row: TokenIds, filler: int, width: int) -> TokenIds:
        padding = [filler] * (width - len(row))
        return row + padding if self.padding_side == "right" else padding + row
