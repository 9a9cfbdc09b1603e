"""One HTTP request as logs, metrics and traces see it: its id, how it went, how many tokens, when. Never any text.

Knows nothing of who writes what down. The record of the request that a task works on is found by `current_record`,
which is how a log line of any module gets the request's id.
"""

from __future__ import annotations

import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

from tern.engine import FinishReason, SamplingParams
from tern.server.sink import Ending

OUTCOMES = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.ERROR: "error",
}
"""How a choice ended, in vLLM's words."""

MAX_ID_LENGTH = 128
_ID = re.compile(rf"[A-Za-z0-9._:/+=@-]{{1,{MAX_ID_LENGTH}}}")

_current: ContextVar[RequestRecord | None] = ContextVar("tern_request_record", default=None)


def accepted_id(given: str | None) -> str:
    """The id that a client gave its request, or a new one if it gave none, or one that no log should hold."""
    return given if given is not None and _ID.fullmatch(given) else uuid.uuid4().hex


@dataclass
class RequestRecord:
    """What is known of a request so far. Times are seconds of `time.monotonic()`, `began_ns` is since 1970.

    `route` is the path's pattern, "" where no route answers. `complete` says that the whole answer was sent. What
    follows `complete` is there only for a request that generates; the engine's thread writes it.
    """

    request_id: str
    method: str
    path: str
    trace_headers: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    began_ns: int = field(default_factory=time.time_ns)
    ended: float | None = None
    route: str = ""
    status: int = 0
    complete: bool = False
    answer_id: str | None = None
    params: SamplingParams | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token: float | None = None
    endings: list[Ending] = field(default_factory=list)

    @property
    def generates(self) -> bool:
        """Whether the engine was asked for anything."""
        return self.answer_id is not None

    @property
    def seconds(self) -> float:
        """How long the request took, until now if it goes on."""
        return (time.monotonic() if self.ended is None else self.ended) - self.started

    @property
    def first_token_seconds(self) -> float | None:
        """From the request to its first token."""
        return None if self.first_token is None else self.first_token - self.started

    @property
    def reasoning_tokens(self) -> int:
        """Generated tokens inside thoughts, of the choices that have ended."""
        return sum(ending.num_reasoning_tokens for ending in self.endings)

    @property
    def outcome(self) -> str:
        """stop, length, abort (the client left, or the server took it back) or error; of several choices the worst."""
        if self.status >= 400 and self.status != 499:
            return "error"
        reasons = {OUTCOMES[ending.finish.reason] for ending in self.endings}
        if "error" in reasons:
            return "error"
        if not self.complete or self.status == 499 or "abort" in reasons:
            return "abort"
        return "length" if "length" in reasons else "stop"

    def token(self, now: float) -> None:
        """A token of any choice came."""
        self.generated_tokens += 1
        if self.first_token is None:
            self.first_token = now


def current_record() -> RequestRecord | None:
    """The record of the request that this task works on; None outside of requests."""
    return _current.get()


def enter(record: RequestRecord) -> None:
    """Work on this request from now on, in this task and what it starts."""
    _current.set(record)
