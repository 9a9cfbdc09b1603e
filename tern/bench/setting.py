"""Where and when something was measured: what a figure must carry to be read later. Measures nothing."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from tern import __version__
from tern.bench.hardware import memory_bytes, processor_name

SECRET_FLAGS = ("--api-key",)


@dataclass(frozen=True)
class Setting:
    """`command` as it can be typed again; `date` to the minute, UTC; `memory_gb`: 10^9 bytes of the whole machine.

    `gpu`: the name of the card that was measured; None where the processor was.
    """

    command: str
    date: str
    processor: str
    memory_gb: float
    tern: str
    python: str
    gpu: str | None = None

    @property
    def machine(self) -> str:
        """What was measured, and the machine that it stands in."""
        around = f"{self.processor}, {self.memory_gb:.0f} GB"
        return around if self.gpu is None else f"{self.gpu} in a machine with {around}"

    @classmethod
    def now(cls, command: Sequence[str], gpu: str | None = None) -> Setting:
        """This machine at this moment, and the command with its arguments; keys are left out of it."""
        date = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        typed = shlex.join(_without_secrets(command))
        return cls(typed, date, processor_name(), memory_bytes() / 1e9, __version__, platform.python_version(), gpu)


def _without_secrets(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `...` for the values of `SECRET_FLAGS`."""
    shown: list[str] = []
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if equals and flag in SECRET_FLAGS:
            shown.append(f"{flag}=...")
        else:
            shown.append("..." if shown and shown[-1] in SECRET_FLAGS else argument)
    return shown
