"""The tokens of one response on their way to text: decoded, watched for stop strings, the thought held to its bounds.

Knows a tokenizer, stop strings and the end of a thought. Knows neither the engine nor events: it says whether to stop
and which tokens to write next, and whoever drives it obeys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tern.chat.detokenizer import Detokenizer
from tern.chat.loop_guard import LoopGuard
from tern.chat.parser import (
    END_RESPONSE,
    END_THINK,
    END_TOOL_CALL,
    RESPONSE,
    THINK,
    ParserState,
    state_after_prompt,
)
from tern.chat.stop_strings import StopStrings
from tern.chat.tokenizer import Tokenizer

CLOSE_THOUGHT = "\n</think>\n\n<response>\n"
"""What ends a thought from outside, as the protocol writes it."""
CLOSING_SENTENCE = {
    "en": "\n\nI have thought long enough; I will answer now with what I have.",
    "zh": "\n\n我已经想得够久了，现在就根据已有的思考作答。",
}
_LANGUAGE_SAMPLE = 400  # characters at the end of the thought that say which language it is in
_END_THINK = re.compile(END_THINK)
_OPENED_AGAIN = re.compile(rf"(?:{END_THINK}|{END_RESPONSE}|{END_TOOL_CALL})\n*{THINK}")
_LONGEST_OPENING = 64  # characters of a tag, newlines and <think>
_MAX_CHARACTER_TOKENS = 3  # tokens after which an unfinished character will not be finished


@dataclass(frozen=True)
class ThinkingControl:
    """How long a thought may be.

    `max_tokens` is its budget, None for no bound; it may run over by the few tokens that finish a character or a
    `</think>` under way. `loop_guard` ends a thought that repeats itself. `closing_text` is what is written when the
    thought is ended from outside; None: a sentence in the thought's own language and `CLOSE_THOUGHT`, of that the
    `<response>` only if `opens_response`: where a grammar allows calls, it is the model's to say what comes.
    """

    max_tokens: int | None = None
    loop_guard: bool = True
    closing_text: str | None = None
    opens_response: bool = True


@dataclass(frozen=True)
class TextStep:
    """What one token brought: text that is certain now, whether a stop string ends the response here, and tokens to
    write before the model goes on.
    """

    text: str
    stop: bool = False
    force: tuple[int, ...] = ()


class TextStream:
    """Turns the tokens of one response into text.

    `stop` strings are found across token borders, but not inside a thought, and never before the response has
    `min_tokens` tokens. `thinking` is given for the response of a chat, and with it `prompt_end`, the last characters
    of its prompt, which say whether the response begins inside a thought. The response continues a prompt, so the space
    before its first word is kept.

    `num_reasoning_tokens` counts a thought's tokens up to and with the one that completes `</think>`, forced ones
    included; `stop_string` is the stop string that was found.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        thinking: ThinkingControl | None = None,
        prompt_end: str = THINK,
    ) -> None:
        self._vocab_size = tokenizer.vocab_size
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stops = StopStrings(stop, include=include_stop)
        self._tokens_before_stop = max(0, min_tokens - 1)  # a stop string may not end the response at these
        self._thoughts = _Thoughts(tokenizer, thinking, prompt_end) if thinking is not None else None

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of the thought so far."""
        return self._thoughts.num_tokens if self._thoughts is not None else 0

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the response."""
        return self._stops.found

    def push(self, token_id: int) -> TextStep:
        """Take the next token, sampled or forced."""
        # A network may have more ids than its tokenizer (padding, a stand-in tokenizer): those have no text.
        text = self._detokenizer.push(token_id) if token_id < self._vocab_size else ""
        thoughts = self._thoughts if self._thoughts is not None and self._thoughts.borders.inside else None
        released = self._watch(text)
        self._tokens_before_stop = max(0, self._tokens_before_stop - 1)
        if self._stops.found is not None:
            return TextStep(released, stop=True)
        if thoughts is None:
            return TextStep(released)
        return TextStep(released, force=thoughts.push(token_id, text, self._detokenizer.inside_character))

    def finish(self) -> str:
        """The response is over: the text that was held back, unless a stop string ended it."""
        if self._stops.found is not None:
            return ""
        return self._watch(self._detokenizer.finish()) + self._stops.finish()

    def _watch(self, text: str) -> str:
        """What of the text can be released: all of a thought, and up to a stop string elsewhere."""
        if self._thoughts is None:
            return self._find_stop(text)
        released = ""
        for inside, piece in self._thoughts.borders.split(text):
            released += self._stops.finish() + piece if inside else self._find_stop(piece)
            if self._stops.found is not None:
                break
        return released

    def _find_stop(self, text: str) -> str:
        return text if self._tokens_before_stop else self._stops.push(text)


class _Borders:
    """Where thoughts begin and end in a response, as `ResponseParser` sees it. `inside`: the text ends in one."""

    def __init__(self, prompt_end: str) -> None:
        self.inside = state_after_prompt(prompt_end) is ParserState.REASONING
        self._tail = "" if self.inside else prompt_end[-_LONGEST_OPENING:]

    def split(self, text: str) -> Iterator[tuple[bool, str]]:
        """The next text in pieces, each with whether it belongs to a thought; its closing tag still does."""
        while text:
            inside, seen = self.inside, self._tail + text
            found = (_END_THINK if inside else _OPENED_AGAIN).search(seen)
            if found is None:
                self._tail = seen[-_LONGEST_OPENING:]
                yield inside, text
                return
            border = found.end() - len(self._tail)
            piece, text = text[:border], text[border:]
            self._tail = END_THINK if inside else ""
            self.inside = not inside
            yield inside, piece


class _Thoughts:
    """The thoughts of one response: counts their tokens, and ends one when the budget is spent or it repeats itself."""

    def __init__(self, tokenizer: Tokenizer, control: ThinkingControl, prompt_end: str) -> None:
        self.borders = _Borders(prompt_end)
        self._tokenizer = tokenizer
        self._control = control
        self.num_tokens = 0
        self._begin()

    def _begin(self) -> None:
        self._guard = LoopGuard() if self._control.loop_guard else None
        self._tail = ""  # the end of the thought's text
        self._closing = False
        self._overdue = False
        self._half_character = 0

    def push(self, token_id: int, text: str, inside_character: bool) -> tuple[int, ...]:
        """Take a token that began inside a thought; returns the tokens that end the thought, mostly none."""
        self.num_tokens += 1
        if not self.borders.inside:
            self._begin()
            return ()
        self._tail = (self._tail + text)[-_LANGUAGE_SAMPLE:]
        if self._closing:
            return ()
        budget = self._control.max_tokens
        self._overdue = self._overdue or (budget is not None and self.num_tokens >= budget)
        self._overdue = self._overdue or (self._guard is not None and self._guard.push(token_id))
        self._half_character = self._half_character + 1 if inside_character else 0
        if not self._overdue or _ends_inside_tag(self._tail) or 0 < self._half_character <= _MAX_CHARACTER_TOKENS:
            return ()
        self._closing = True
        return tuple(self._tokenizer.encode_continuation(self._closing_text()))

    def _closing_text(self) -> str:
        if self._control.closing_text is not None:
            return self._control.closing_text
        closing = CLOSE_THOUGHT if self._control.opens_response else CLOSE_THOUGHT.removesuffix(f"{RESPONSE}\n")
        return CLOSING_SENTENCE[_language(self._tail)] + closing


def _ends_inside_tag(text: str) -> bool:
    """Whether the text ends with the beginning of a `</think>`: the model is about to close the thought itself."""
    start = text.rfind("<", -len(END_THINK))
    return start >= 0 and END_THINK.startswith(text[start:])


def _language(text: str) -> str:
    """Chinese if a sizeable part of the text is: a Chinese character says about as much as four Latin letters."""
    han = sum("\u4e00" <= char <= "\u9fff" for char in text)
    latin = sum(char.isascii() and char.isalpha() for char in text)
    return "zh" if 4 * han > latin else "en"
