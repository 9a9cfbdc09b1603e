"""A model's text protocol in one piece: its tokenizer and its template, from messages to a prompt and back to text.

Knows how a prompt opens, skips or bounds the thought. Knows no engine: the sampling values that concern text come as
anything with those fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tern.chat.messages import Message, validate_messages
from tern.chat.parser import END_THINK, ParserState, state_after_prompt
from tern.chat.template import ChatTemplate
from tern.chat.text_stream import TextStream, ThinkingControl
from tern.chat.tokenizer import Tokenizer
from tern.errors import InvalidRequestError

_TEXTS = ("content", "reasoning_content")
_PRIVATE_USE = range(0xE000, 0xF900)


class TextParams(Protocol):
    """The sampling values that concern text, in vLLM's names."""

    @property
    def stop(self) -> str | Sequence[str] | None: ...

    @property
    def include_stop_str_in_output(self) -> bool: ...

    @property
    def skip_special_tokens(self) -> bool: ...

    @property
    def reasoning_max_tokens(self) -> int | None: ...


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt ready for the engine. `state` is where in a response the model goes on; None for plain text."""

    text: str
    token_ids: tuple[int, ...]
    state: ParserState | None = None


class ChatProtocol:
    """Tokenizer and template of one model. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.template = template
        control = [text for i in tokenizer.special_ids if len(text := tokenizer.token_text(i)) > 1]
        self._control = re.compile(rf"(?={'|'.join(map(re.escape, control))})(.)", re.DOTALL) if control else None
        if tokenizer.strips_leading_space:
            self._control = None  # text cannot be encoded in parts

    @classmethod
    def from_directory(cls, path: str | Path) -> ChatProtocol:
        """Open the files of a checkpoint. Raises `CheckpointError`."""
        return cls(Tokenizer.from_directory(path), ChatTemplate.from_directory(path))

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """Render a conversation, ending where the model is to go on.

        `enable_thinking` False in `template_kwargs` closes the thought before it begins, whether or not the template
        knows of it. Raises `InvalidRequestError`.
        """
        guarded, mark = self._guard(validate_messages(messages))
        text = self.template.render(guarded, tools=tools, template_kwargs=template_kwargs)
        thinking = (template_kwargs or {}).get("enable_thinking", True)
        if not isinstance(thinking, bool):
            raise InvalidRequestError(
                f"chat_template_kwargs.enable_thinking is {thinking!r}: it must be true or false.",
                param="chat_template_kwargs.enable_thinking",
            )
        if not thinking and state_after_prompt(text) is ParserState.REASONING:
            text = text.rstrip("\n") + f"\n\n{END_THINK}\n\n" + ("" if tools else "<response>\n")
        parts = text.split(mark) if mark else [text]
        token_ids = tuple(token_id for part in parts for token_id in self.tokenizer.encode(part))
        return RenderedPrompt("".join(parts), token_ids, state_after_prompt(text))

    def _guard(self, messages: list[Message]) -> tuple[list[Message], str]:
        """Keep control tokens that are spelt out in messages from becoming control tokens.

        Each gets a mark, a character that no message holds, behind its first character; where the rendered text is cut
        at the marks, the halves encode as ordinary text. Nothing is marked ("" is returned) when no message spells
        one, or when the tokenizer would put a space at the beginning of each part.
        """
        control = self._control
        texts = [text for message in messages for key in _TEXTS if isinstance(text := message.get(key), str)]
        if control is None or not any(control.search(text) for text in texts):
            return messages, ""
        used = set().union(*texts)
        mark = next((char for char in map(chr, _PRIVATE_USE) if char not in used), None)
        if mark is None:
            raise InvalidRequestError(
                "The messages spell control tokens and use every private-use character (U+E000 to U+F8FF): "
                "leave some of them out.",
                param="messages",
            )
        guarded = [
            {
                key: control.sub(rf"\1{mark}", value) if key in _TEXTS and value else value
                for key, value in message.items()
            }
            for message in messages
        ]
        return guarded, mark

    def plain_prompt(self, text: str) -> RenderedPrompt:
        """Text to be continued as it is."""
        return RenderedPrompt(text, tuple(self.tokenizer.encode(text)))

    def text_stream(self, params: TextParams, *, prompt: RenderedPrompt | None = None) -> TextStream:
        """The stream for one response to `prompt` (None or a plain prompt: no thought to watch).

        In a chat, stop strings count only behind the thought.
        """
        thinks = prompt is not None and prompt.state is ParserState.REASONING
        stop = (params.stop,) if isinstance(params.stop, str) else tuple(params.stop or ())
        return TextStream(
            self.tokenizer,
            stop=stop,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            stop_after=END_THINK if thinks else None,
            thinking=ThinkingControl(max_tokens=params.reasoning_max_tokens) if thinks else None,
        )
