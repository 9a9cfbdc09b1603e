"""A model's text protocol in one piece: its tokenizer and its template, from messages to a prompt and back to text.

Knows how a prompt opens, skips or bounds the thought. Knows no engine: the sampling values that concern text come as
anything with those fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tern.chat.control_tokens import ControlTokens
from tern.chat.messages import validate_messages
from tern.chat.parser import ParserState, state_after_prompt
from tern.chat.template import ChatTemplate
from tern.chat.text_stream import TextStream, ThinkingControl
from tern.chat.tokenizer import Tokenizer
from tern.chat.tools import validate_tools


class TextParams(Protocol):
    """The sampling values that concern text, in vLLM's names."""

    @property
    def stop(self) -> str | Sequence[str] | None: ...

    @property
    def include_stop_str_in_output(self) -> bool: ...

    @property
    def min_tokens(self) -> int: ...

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
        self._control = ControlTokens(map(tokenizer.token_text, tokenizer.special_ids))

    @classmethod
    def from_directory(cls, path: str | Path, given: Mapping[str, bytes] | None = None) -> ChatProtocol:
        """Open the files of a checkpoint, or those `given` in their place, by name. Raises `CheckpointError`."""
        return cls(Tokenizer.from_directory(path, given), ChatTemplate.from_directory(path, given))

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """Render a conversation, ending where the model is to go on.

        `enable_thinking` False in `template_kwargs` closes the thought before it begins, whether or not the template
        knows of it. Control tokens that messages or tools spell out are encoded as text. Raises `InvalidRequestError`.
        """
        given = [validate_messages(messages), validate_tools(tools)]
        (guarded, guarded_tools), mark = self._control.guard(given)
        text = self.template.render(guarded, tools=guarded_tools, template_kwargs=template_kwargs)
        first, *rest = text.split(mark) if mark else [text]
        token_ids = self.tokenizer.encode(first)
        for part in rest:
            token_ids += self.tokenizer.encode_continuation(part)
        return RenderedPrompt("".join([first, *rest]), tuple(token_ids), state_after_prompt(text))

    def plain_prompt(self, text: str) -> RenderedPrompt:
        """Text to be continued as it is."""
        return RenderedPrompt(text, tuple(self.tokenizer.encode(text)))

    def text_stream(
        self, params: TextParams, *, prompt: RenderedPrompt | None = None, opens_response: bool = True
    ) -> TextStream:
        """The stream for one response to `prompt` (None or a plain prompt: no thought to watch).

        In a chat, stop strings do not count inside a thought. `opens_response`: as in `ThinkingControl`.
        """
        end = prompt.text if prompt is not None and prompt.state is not None else None
        stop = (params.stop,) if isinstance(params.stop, str) else tuple(params.stop or ())
        return TextStream(
            self.tokenizer,
            stop=stop,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
            thinking=ThinkingControl(max_tokens=params.reasoning_max_tokens, opens_response=opens_response)
            if end is not None
            else None,
            prompt_end=end or "",
        )
