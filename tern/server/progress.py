"""Groups what came since the last look by choice, so that one wake-up costs one chunk and not one a token.

Knows updates and events; knows no JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tern.chat import ContentDelta, ReasoningDelta, ResponseEvent, ToolCallDelta
from tern.engine import GeneratedToken
from tern.server.sink import Ending, Update


@dataclass
class Progress:
    """The news of one choice: its events, neighbours of one kind joined; its tokens; its ending, if it ended."""

    events: list[ResponseEvent] = field(default_factory=list)
    tokens: list[GeneratedToken] = field(default_factory=list)
    ending: Ending | None = None

    def take(self, update: Update) -> None:
        """Add one update."""
        for event in update.events:
            joined = join(self.events[-1], event) if self.events else None
            if joined is None:
                self.events.append(event)
            else:
                self.events[-1] = joined
        if update.token is not None:
            self.tokens.append(update.token)
        self.ending = update.ending or self.ending


def by_choice(updates: Iterable[Update]) -> dict[int, Progress]:
    """The updates of each choice together, choices in the order of their first update."""
    found: dict[int, Progress] = {}
    for update in updates:
        found.setdefault(update.index, Progress()).take(update)
    return found


def join(first: ResponseEvent, second: ResponseEvent) -> ResponseEvent | None:
    """Two neighbouring deltas as one, or None if they belong to different parts of the message."""
    match first, second:
        case ReasoningDelta(a), ReasoningDelta(b):
            return ReasoningDelta(a + b)
        case ContentDelta(a), ContentDelta(b):
            return ContentDelta(a + b)
        case ToolCallDelta(), ToolCallDelta(name=None) if first.index == second.index:
            return ToolCallDelta(first.index, first.id, first.name, first.arguments + second.arguments)
    return None
