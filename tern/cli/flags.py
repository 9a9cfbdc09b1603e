"""Flags as people type them for other engines: underscores or dashes, and flags that need nothing done here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tern.errors import OptionError

PARSER_NAMES = ("ernie_x1", "ernie-x1", "ernie45", "ernie_45", "ernie-45")
"""What FastDeploy and vLLM call the parser of this model; Tern has one parser, and it is always on."""

UNITS = {"GB": 10**9, "GiB": 2**30}
MAX_SIZE = 2**20


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--some_flag` written `--some-flag`, values untouched, up to a bare `--`."""
    spelled: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*spelled, argument, *rest]
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            argument = flag.replace("_", "-") + equals + value
        spelled.append(argument)
    return spelled


def check_parser(flag: str, name: str | None) -> None:
    """Refuse a response parser that this model does not speak."""
    if name is not None and name not in PARSER_NAMES:
        raise OptionError(f"{flag} is {name!r}: this model's parser is called {', '.join(PARSER_NAMES)}.")


def check_parallelism(flag: str, size: int) -> None:
    """Refuse a split over several devices."""
    if size != 1:
        raise OptionError(f"{flag} is {size}: Tern runs on one device, so it must be 1.")


def size_in_bytes(flag: str, size: float | None, *, unit: str) -> int | None:
    """The value of a flag that is a number of GiB or GB, as bytes."""
    if size is None:
        return None
    if not 0 < size <= MAX_SIZE:
        raise OptionError(f"{flag} is {size:g}: it must be a number of {unit} above 0 and at most {MAX_SIZE}.")
    return max(1, int(size * UNITS[unit]))


def names_in(flag: str, values: Sequence[str] | None) -> tuple[str, ...]:
    """The names that a flag was given, each by itself or, as vLLM takes them, as JSON lists."""
    names: list[str] = []
    for value in values or ():
        try:
            given = json.loads(value) if value.startswith("[") else [value]
        except ValueError:
            given = None
        if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
            raise OptionError(f'{flag} is {value[:100]!r}: give one name, or a JSON list of them such as ["*"].')
        names += given
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class IgnoredFlag:
    """A flag that another engine's process layout needs and Tern's does not; `takes_value` says how it is parsed."""

    name: str
    takes_value: bool = True


IGNORED_FLAGS = (
    IgnoredFlag("--engine-worker-queue-port"),
    IgnoredFlag("--cache-queue-port"),
    IgnoredFlag("--load-choices"),
    IgnoredFlag("--swap-space"),
    IgnoredFlag("--workers"),
    IgnoredFlag("--graph-optimization-config"),
    IgnoredFlag("--distributed-executor-backend"),
    IgnoredFlag("--trust-remote-code", takes_value=False),
    IgnoredFlag("--use-cudagraph", takes_value=False),
    IgnoredFlag("--enable-chunked-prefill", takes_value=False),
    IgnoredFlag("--enable-auto-tool-choice", takes_value=False),
    IgnoredFlag("--enable-reasoning", takes_value=False),
    IgnoredFlag("--disable-log-requests", takes_value=False),
    IgnoredFlag("--disable-log-stats", takes_value=False),
)


def without_ignored(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments less the ignored flags and their values, and the names of those flags.

    Raises `OptionError` for such a flag without its value.
    """
    known = {flag.name: flag for flag in IGNORED_FLAGS}
    kept: list[str] = []
    ignored: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        flag = known.get(name)
        if flag is None:
            kept.append(argument)
            continue
        if flag.takes_value and not equals and next(rest, None) is None:
            raise OptionError(f"{name} needs a value.")
        ignored.append(name)
    return kept, ignored
