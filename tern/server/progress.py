"""Groups what came since the last look by choice, so that one wake-up costs one chunk and not one a token.

Knows updates and events; knows no JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

from tern.chat import ResponseEvent, ToolCallDelta
from tern.engine import GeneratedToken, ScoredToken
from tern.server.sink import Ending, Update

TOKEN_CHARACTERS = 8
LOGPROB_CHARACTERS = 100


@dataclass
class Progress:
    """The news of one choice: its events; its tokens; its ending, if it ended; scored tokens of its prompt."""

    events: list[ResponseEvent] = field(default_factory=list)
    tokens: list[GeneratedToken] = field(default_factory=list)
    ending: Ending | None = None
    prompt: list[ScoredToken] = field(default_factory=list)

    def take(self, update: Update) -> None:
        """Add one update."""
        self.events += update.events
        self.prompt += update.prompt
        if update.token is not None:
            self.tokens.append(update.token)
        self.ending = update.ending or self.ending

    def joined_events(self) -> Iterator[ResponseEvent]:
        """The events, neighbouring deltas of one part of the message as one."""
        for _, deltas in groupby(self.events, _part):
            yield _joined(list(deltas))


def by_choice(updates: Iterable[Update]) -> dict[int, Progress]:
    """The updates of each choice together, choices in the order of their first update."""
    found: dict[int, Progress] = {}
    for update in updates:
        found.setdefault(update.index, Progress()).take(update)
    return found


def json_size(updates: Iterable[Update]) -> int:
    """About how many characters of JSON the updates become."""
    tokens = [update.token for update in updates if update.token is not None]
    logprobs = sum(len(token.top_logprobs) + (token.logprob is not None) for token in tokens)
    return TOKEN_CHARACTERS * len(tokens) + LOGPROB_CHARACTERS * logprobs


def _part(event: ResponseEvent) -> tuple[type[ResponseEvent], int]:
    """The part of the message that a delta belongs to: the thought, the answer, or one of the calls."""
    return type(event), event.index if isinstance(event, ToolCallDelta) else 0


def _joined(deltas: list[ResponseEvent]) -> ResponseEvent:
    first, text = deltas[0], "".join(map(_text, deltas))
    return replace(first, arguments=text) if isinstance(first, ToolCallDelta) else replace(first, text=text)


def _text(event: ResponseEvent) -> str:
    return event.arguments if isinstance(event, ToolCallDelta) else event.text
