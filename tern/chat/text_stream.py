"""The tokens of one response on their way to text: decoded, watched for stop strings, the thought held to its bounds.

Knows a tokenizer, stop strings and the end of a thought. Knows neither the engine nor events: it says whether to stop
and which tokens to write next, and whoever drives it obeys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tern.chat.detokenizer import Detokenizer
from tern.chat.loop_guard import LoopGuard
from tern.chat.parser import END_THINK
from tern.chat.stop_strings import StopStrings
from tern.chat.tokenizer import Tokenizer

CLOSE_THOUGHT = "\n</think>\n\n<response>\n"
"""What ends a thought from outside, as the protocol writes it."""
CLOSING_SENTENCE = {
    "en": "\n\nI have thought long enough; I will answer now with what I have.",
    "zh": "\n\n我已经想得够久了，现在就根据已有的思考作答。",
}
_LANGUAGE_SAMPLE = 400  # characters at the end of the thought that say which language it is in
_MAX_CHARACTER_TOKENS = 3  # tokens after which an unfinished character will not be finished


@dataclass(frozen=True)
class ThinkingControl:
    """How long a thought may be.

    `max_tokens` is its budget, None for no bound; it may run over by the few tokens that finish a character or a
    `</think>` under way. `loop_guard` ends a thought that repeats itself. `closing_text` is what is written when the
    thought is ended from outside; None: a sentence in the thought's own language and `CLOSE_THOUGHT`.
    """

    max_tokens: int | None = None
    loop_guard: bool = True
    closing_text: str | None = None


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

    `stop` strings are found across token borders; with `stop_after` they count only behind the first occurrence of
    that text, and never before the response has `min_tokens` tokens. `thinking` is given when the response begins
    inside a thought. The response continues a prompt, so the space before its first word is kept.

    `num_reasoning_tokens` counts the tokens up to and with the one that completes `</think>`, forced ones included;
    `stop_string` is the stop string that was found.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        stop_after: str | None = None,
        min_tokens: int = 0,
        thinking: ThinkingControl | None = None,
    ) -> None:
        self._vocab_size = tokenizer.vocab_size
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stops = StopStrings(stop, include=include_stop)
        self._marker = stop_after if stop else None  # until it is found
        self._marker_tail = ""
        self._tokens_before_stop = max(0, min_tokens - 1)  # a stop string may not end the response at these
        self._thought = Thought(tokenizer, thinking) if thinking is not None else None

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of the thought so far."""
        return self._thought.num_tokens if self._thought is not None else 0

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the response."""
        return self._stops.found

    def push(self, token_id: int) -> TextStep:
        """Take the next token, sampled or forced."""
        # A network may have more ids than its tokenizer (padding, a stand-in tokenizer): those have no text.
        text = self._detokenizer.push(token_id) if token_id < self._vocab_size else ""
        force: tuple[int, ...] = ()
        if self._thought is not None and self._thought.open:
            force = self._thought.push(token_id, text, inside_character=self._detokenizer.inside_character)
        released = self._watch(text)
        self._tokens_before_stop = max(0, self._tokens_before_stop - 1)
        stopped = self._stops.found is not None
        return TextStep(released, stopped, () if stopped else force)

    def finish(self) -> str:
        """The response is over: the text that was held back, unless a stop string ended it."""
        if self._stops.found is not None:
            return ""
        return self._watch(self._detokenizer.finish()) + self._stops.finish()

    def _watch(self, text: str) -> str:
        if self._marker is None:
            return self._find_stop(text)
        seen = self._marker_tail + text
        found = seen.find(self._marker)
        if found < 0:
            self._marker_tail = seen[max(0, len(seen) - len(self._marker) + 1) :]
            return text
        behind = found + len(self._marker) - len(self._marker_tail)
        self._marker = None
        return text[:behind] + self._find_stop(text[behind:])

    def _find_stop(self, text: str) -> str:
        return text if self._tokens_before_stop else self._stops.push(text)


class Thought:
    """The thought of one response: counts it, sees it end, and ends it when its bounds are reached."""

    def __init__(self, tokenizer: Tokenizer, control: ThinkingControl) -> None:
        self._tokenizer = tokenizer
        self._control = control
        self._guard = LoopGuard() if control.loop_guard else None
        self._tail = ""  # the end of the thought's text
        self._closing = False
        self._overdue = False
        self._half_character = 0
        self.open = True
        self.num_tokens = 0

    def push(self, token_id: int, text: str, *, inside_character: bool) -> tuple[int, ...]:
        """Take one token of the thought and its text; returns the tokens that end the thought, mostly none."""
        self.num_tokens += 1
        searched = self._tail[-(len(END_THINK) - 1) :] + text
        self._tail = (self._tail + text)[-_LANGUAGE_SAMPLE:]
        if END_THINK in searched:
            self.open = False
            return ()
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
        return CLOSING_SENTENCE[_language(self._tail)] + CLOSE_THOUGHT


def _ends_inside_tag(text: str) -> bool:
    """Whether the text ends with the beginning of a `</think>`: the model is about to close the thought itself."""
    start = text.rfind("<", -len(END_THINK))
    return start >= 0 and END_THINK.startswith(text[start:])


def _language(text: str) -> str:
    """Chinese if a sizeable part of the text is: a Chinese character says about as much as four Latin letters."""
    han = sum("\u4e00" <= char <= "\u9fff" for char in text)
    latin = sum(char.isascii() and char.isalpha() for char in text)
    return "zh" if 4 * han > latin else "en"
