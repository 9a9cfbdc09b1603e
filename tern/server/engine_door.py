"""What the server asks of an engine and of a model; `tern.engine.EngineService` and a resolved model are such.

Tests of the HTTP layer put a scripted engine behind this door.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tern.engine import EngineFacts, EngineStats, PromptProgress, Request


class EngineDoor(Protocol):
    """An engine on a thread of its own. Every method may be called from any thread and returns at once."""

    @property
    def state(self) -> str:
        """starting, ready, draining, failed or stopped."""

    @property
    def max_model_len(self) -> int:
        """Longest prompt and answer together, in tokens."""

    @property
    def capacity(self) -> int | None:
        """Most requests, running and waiting, that it takes at once; None has no limit."""

    @property
    def token_capacity(self) -> int | None:
        """Most prompt tokens that may wait at once, if they are several prompts'; None has no limit."""

    def start(self) -> None:
        """Begin to serve."""

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `InvalidRequestError`, `QueueFullError` or `EngineUnavailableError`."""

    def cancel(self, request_id: str) -> object:
        """Take a request back, queued or running; an unknown one is ignored."""

    def stats(self) -> EngineStats:
        """A snapshot of queues, cache and counters."""

    def facts(self) -> EngineFacts:
        """What stays the same while it lives."""

    def progress(self, request_id: str) -> PromptProgress | None:
        """How far a request's prompt has been read; None once it has been, or if there is no such request."""

    def heartbeat_age(self) -> float:
        """Seconds since the thread last showed that it lives."""

    def drain(self, timeout: float) -> bool:
        """Take no more requests and wait until those there have ended; False if `timeout` seconds were too few."""

    def stop(self) -> None:
        """End what runs, and the thread."""


class GenerationDefaults(Protocol):
    """The checkpoint's own generation settings."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""

    def sampling_defaults(self) -> Mapping[str, Any]:
        """`SamplingParams` values by name, those that the checkpoint names."""


class ModelIdentity(Protocol):
    """What is served: its name and its generation settings."""

    @property
    def name(self) -> str:
        """The name that the model was opened with."""

    @property
    def generation(self) -> GenerationDefaults:
        """The checkpoint's own generation settings."""
