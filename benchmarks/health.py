"""How long /health takes while the server does what could block its event loop: one kind of large request at a time.

    python -m benchmarks.health --seconds 10

The server, the client that loads it and the one that asks for /health are three processes. /health is asked every 5 ms
on one connection that is kept. A wait counts from the moment at which the question was due, so that a stall counts for
every question that it delays. The exit status is 0 if none waited 50 ms, and 1 if one did. On a machine that has other
work the figures are of that work.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.server_process import tern_serve
from tern.bench import Setting
from tern.errors import RemoteServerError, TernError

PERIOD = 0.005
"""Seconds from one question to the next."""

LIMIT = 0.05
"""Seconds that no question may wait."""

SIZE = 1_000_000
"""Bytes of a large request, about."""

WORDS = (
    "the",
    "weather",
    "in",
    "Beijing",
    "is",
    "sunny",
    "and",
    "26",
    "degrees,",
    "北京今天天气晴朗,",
    "def",
    "f(x):\n",
)


@dataclass(frozen=True)
class Waits:
    """How long questions waited, in seconds, and how many large requests were answered meanwhile."""

    questions: int
    median: float
    p99: float
    longest: float
    requests: int

    @classmethod
    def of(cls, seconds: Sequence[float], requests: int) -> Waits:
        """The p99 is the shortest wait that at most a hundredth of all exceed."""
        ordered = sorted(seconds)
        p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
        return cls(len(ordered), statistics.median(ordered), p99, ordered[-1], requests)


def text_of(size: int, draw: random.Random) -> str:
    """About so many bytes of words, never the same ones."""
    return " ".join(draw.choices(WORDS, k=max(1, size // 8)))


def tokenise(draw: random.Random) -> tuple[str, Any]:
    """A megabyte of text."""
    return "/tokenize", {"prompt": text_of(SIZE, draw)}


def one_word(draw: random.Random) -> tuple[str, Any]:
    """A megabyte without a space, which a tokenizer cannot split before it merges."""
    return "/tokenize", {"prompt": "".join(draw.choices("abcdefgh", k=SIZE))}


def render(draw: random.Random) -> tuple[str, Any]:
    """A chat of a megabyte in as many messages as it may have."""
    turns = [{"role": role, "content": text_of(SIZE // 9_998, draw)} for role in ("user", "assistant")] * 4_999
    return "/tokenize", {"messages": [*turns, {"role": "user", "content": "And?"}]}


def count(draw: random.Random) -> tuple[str, Any]:
    """A message of a megabyte in blocks, as Anthropic's clients send it."""
    blocks = [{"type": "text", "text": text_of(SIZE // 100, draw)} for _ in range(100)]
    return "/v1/messages/count_tokens", {"messages": [{"role": "user", "content": blocks}]}


def grammar(draw: random.Random) -> tuple[str, Any]:
    """A schema of many objects, none of which was compiled before."""
    names = [f"field_{draw.randrange(10**9)}" for _ in range(150)]
    leaf = {"type": "string", "pattern": "^[a-z]{2,30}(-[0-9]{1,9})*$"}
    inner = {"type": "object", "properties": {f"{name}_of_it": leaf for name in names[:4]}}
    schema = {"type": "object", "properties": dict.fromkeys(names, inner), "required": names}
    return _form({"guided_json": schema})


def expression(draw: random.Random) -> tuple[str, Any]:
    """A long regular expression."""
    choices = "|".join(f"[a-z]{{1,9}}{draw.randrange(10**9)}" for _ in range(400))
    return _form({"guided_regex": f"({choices}){{1,4}}"})


def decode(draw: random.Random) -> tuple[str, Any]:
    """Several answers at once, which the engine computes in the same process."""
    return _form({"n": 8, "max_tokens": 64, "ignore_eos": True, "seed": draw.randrange(10**9)})


def _form(fields: dict[str, Any]) -> tuple[str, Any]:
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, **fields}


def refuse(draw: random.Random) -> tuple[str, Any]:
    """A megabyte of JSON that is no request."""
    return "/v1/chat/completions", {"messages": [[draw.random()] for _ in range(SIZE // 22)]}


LOADS: dict[str, tuple[Callable[[random.Random], tuple[str, Any]] | None, int]] = {
    "idle": (None, 0),
    "tokenise 1 MB": (tokenise, 200),
    "tokenise a word of 1 MB": (one_word, 200),
    "render 9 999 messages": (render, 200),
    "count a message of 1 MB": (count, 200),
    "refuse 1 MB of JSON": (refuse, 400),
    "compile a schema": (grammar, 200),
    "compile a regular expression": (expression, 200),
    "decode 8 sequences": (decode, 200),
}
"""What is sent, by name, and the status that it must be answered with."""


def load(url: str, name: str, stop: Any, said: Any) -> None:
    """Send requests of a kind until `stop` is set: the first thing that is said is 0, the last how many were answered.

    An answer of another status ends the load with a sentence instead.
    """
    make, status = LOADS[name]
    draw = random.Random(0)
    assert make is not None
    with closing(_connect(url)) as connection:
        for number in itertools.count():
            path, body = make(draw)
            if number == 0:
                said.send(0)
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != status:
                said.send(f"{name}: the server answered {answer.status} instead of {status}: {text[:200]!r}")
                return
            if stop.is_set():
                said.send(number + 1)
                return


def _connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    assert parts.hostname is not None
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=300)


def ask(url: str, seconds: float) -> list[float]:
    """How long each question waited since it was due, for about so many seconds."""
    waits = []
    with closing(_connect(url)) as connection:
        started = time.perf_counter()
        for number in range(max(1, round(seconds / PERIOD))):
            due = started + number * PERIOD
            time.sleep(max(0.0, due - time.perf_counter()))
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise RemoteServerError(f"/health answered {answer.status}.")
            waits.append(time.perf_counter() - due)
    return waits


def measure(url: str, name: str, seconds: float) -> Waits:
    """The waits under one load. Raises `RemoteServerError` if the load is not answered as it should be."""
    if LOADS[name][0] is None:
        return Waits.of(ask(url, seconds), 0)
    processes = multiprocessing.get_context("spawn")
    stop = processes.Event()
    heard, said = processes.Pipe(duplex=False)
    process = processes.Process(target=load, args=(url, name, stop, said), daemon=True)
    process.start()
    said.close()
    with heard:
        try:
            heard.recv()
            waits = ask(url, seconds)
            stop.set()
            answered = heard.recv()
        except EOFError:
            raise RemoteServerError(f"{name}: the process that sends the requests ended.") from None
        finally:
            stop.set()
            process.join()
    if isinstance(answered, str):
        raise RemoteServerError(answered)
    return Waits.of(waits, answered)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and exit with the verdict."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--model", help="a directory, hub id or dummy:PRESET; default: the embedded model")
    made.add_argument("--seconds", type=float, default=10.0, help="for each load")
    made.add_argument("--loads", default=",".join(LOADS), help="which ones, with commas between; default: all")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    wanted = made.parse_args(arguments)
    names = wanted.loads.split(",")
    if unknown := [name for name in names if name not in LOADS]:
        made.error(f"there is no load {unknown[0]!r}: choose from {', '.join(LOADS)}")
    found: dict[str, Waits] = {}
    setting = Setting.now(["python", "-m", "benchmarks.health", *(sys.argv[1:] if arguments is None else arguments)])
    print(f"{setting.processor}, {setting.memory_gb:.0f} GB, {setting.date}; /health, ms")
    print(f"{'':30} {'median':>8} {'p99':>8} {'longest':>8} {'questions':>10} {'requests':>9}")
    try:
        with tern_serve([*([wanted.model] if wanted.model else []), "--log-level", "warning"]) as server:
            ask(server.url, 0.2)
            for name in names:
                one = found[name] = measure(server.url, name, wanted.seconds)
                times = " ".join(f"{seconds * 1000:8.1f}" for seconds in (one.median, one.p99, one.longest))
                print(f"{name:30} {times} {one.questions:10} {one.requests:9}", flush=True)
    except TernError as error:
        made.exit(2, f"{error}\n")
    if wanted.json is not None:
        figures = {"setting": asdict(setting), "waits": {name: asdict(one) for name, one in found.items()}}
        wanted.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    made.exit(int(any(one.longest >= LIMIT for one in found.values())))


if __name__ == "__main__":
    main()
