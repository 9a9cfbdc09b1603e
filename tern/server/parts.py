"""The parts of one choice, in the order in which they come: a thought, a text, a call, each opened, grown and closed.

A whole answer is what its parts are in the end, and a stream tells of the same steps, so that both say the same.
Knows updates and events; knows no JSON of any family.

    ReasoningDelta ReasoningDelta ContentDelta ToolCallDelta(0) ToolCallDelta(0) ToolCallDelta(1)
    └──── thought 0 ────────────┘ └─ text 1 ─┘ └──── call 2 ──────────────────┘ └─── call 3 ───┘
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from tern.chat import ContentDelta, ReasoningDelta, ResponseEvent, ToolCallDelta
from tern.engine import FinishReason, GeneratedToken
from tern.server.sink import Ending, Update


class PartKind(StrEnum):
    """What a part is."""

    THOUGHT = "thought"
    TEXT = "text"
    CALL = "call"


@dataclass
class Part:
    """One part. A call has the `call_id` and the `name` that its first delta brought; its text is its arguments.

    `tokens` are those that a text is made of, where the reader was told to keep them.
    """

    kind: PartKind
    index: int
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    tokens: list[GeneratedToken] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.pieces)

    def cut_by(self, ending: Ending | None) -> bool:
        """Whether the ending came before this part, the last one, was whole."""
        if ending is None:
            return True
        return ending.inside_call if self.kind is PartKind.CALL else ending.finish.reason is FinishReason.LENGTH


@dataclass(frozen=True)
class Opened:
    """A part begins."""

    part: Part


@dataclass
class Grown:
    """The next piece of the part that is open, and the tokens of it."""

    part: Part
    text: str
    tokens: list[GeneratedToken]


@dataclass(frozen=True)
class Closed:
    """A part has ended; the next one begins, or none does."""

    part: Part


Step = Opened | Grown | Closed


class PartReader:
    """Reads the updates of one choice as steps of its parts.

    Parts of a kind in `hidden` are passed over, and what stands before and behind one joins. With `token_bytes`, which
    gives the bytes of a token id, texts keep their tokens.
    """

    def __init__(
        self, hidden: frozenset[PartKind] = frozenset(), token_bytes: Callable[[int], bytes] | None = None
    ) -> None:
        self.parts: list[Part] = []
        self._hidden = hidden
        self._held = None if token_bytes is None else _HeldTokens(token_bytes)
        self._open: tuple[PartKind, int] | None = None

    def take(self, updates: Iterable[Update]) -> list[Step]:
        """The steps that the updates bring; neighbouring pieces of a part are one."""
        steps: list[Step] = []
        for update in updates:
            if self._held is not None and update.token is not None:
                self._held.add(update.token)
            for event in update.events:
                tokens = [] if self._held is None else self._held.of(event)
                if _kind(event) not in self._hidden:
                    self._feed(event, tokens, steps)
        return steps

    def close(self) -> list[Step]:
        """The last step: nothing more comes."""
        was_open, self._open = self._open, None
        return [Closed(self.parts[-1])] if was_open else []

    def _feed(self, event: ResponseEvent, tokens: list[GeneratedToken], steps: list[Step]) -> None:
        text = event.arguments if isinstance(event, ToolCallDelta) else event.text
        same = (_kind(event), event.index if isinstance(event, ToolCallDelta) else 0)
        if same != self._open and (text or isinstance(event, ToolCallDelta)):
            steps += self.close()
            self._open = same
            self.parts.append(_begun(event, len(self.parts)))
            steps.append(Opened(self.parts[-1]))
        if not text:
            return
        part = self.parts[-1]
        part.pieces.append(text)
        part.tokens += tokens
        last = steps[-1] if steps else None
        if isinstance(last, Grown):
            last.text += text
            last.tokens += tokens
        else:
            steps.append(Grown(part, text, list(tokens)))


def _kind(event: ResponseEvent) -> PartKind:
    match event:
        case ReasoningDelta():
            return PartKind.THOUGHT
        case ContentDelta():
            return PartKind.TEXT
        case ToolCallDelta():
            return PartKind.CALL


def _begun(event: ResponseEvent, index: int) -> Part:
    if isinstance(event, ToolCallDelta):
        return Part(PartKind.CALL, index, event.id or "", event.name or "")
    return Part(_kind(event), index)


class _HeldTokens:
    """Tokens whose text has not come out yet: tags and the newlines around them come before a text, and are not it."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._bytes = token_bytes
        self._tokens: list[GeneratedToken] = []

    def add(self, token: GeneratedToken) -> None:
        self._tokens.append(token)

    def of(self, event: ResponseEvent) -> list[GeneratedToken]:
        """The tokens of a text's piece; they and all before them are held no longer."""
        pieces = [self._bytes(token.token_id) for token in self._tokens]
        wanted = b"" if isinstance(event, ToolCallDelta) else event.text.encode()
        start = b"".join(pieces).find(wanted) if wanted else -1
        if start < 0:  # a call is not written as it is sent, and half a character is not the bytes it was
            taken, self._tokens = self._tokens, []
            return taken if isinstance(event, ContentDelta) else []
        first = last = end = 0
        for position, piece in enumerate(pieces):
            if end < start + len(wanted):
                first = position if end <= start else first
                last = position + 1
            end += len(piece)
        taken, self._tokens = self._tokens[first:last], self._tokens[last:]
        return taken if isinstance(event, ContentDelta) else []
