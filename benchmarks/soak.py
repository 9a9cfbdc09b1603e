"""A server for hours under mixed and hostile traffic: nothing may leak, and every answer must be the one it is alone.

    python -m benchmarks.soak --model PACKED --clients 50 --minutes 60 --report soak/

The server is started by the program, with `--serve` as further arguments. Before the crowd comes each question is asked
alone; a question in the crowd must get that very answer. Beside, clients leave, hang up, read nothing and send
nonsense. The server's own /metrics are read all the while. At the end, when all clients have gone, its blocks, tasks,
threads and file descriptors must be back to what they were, and its memory must not have grown since the first quarter.
The exit status is 0 if all of that holds, and 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from benchmarks.server_process import ServerProcess, tern_serve
from benchmarks.soak_clients import Crowd, Question, make_questions, text_of
from tern.bench import Setting
from tern.bench.draw import COLOURS, Destination, finish, page
from tern.errors import TernError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEMORY = "process_resident_memory_bytes"
WATCHED = {
    MEMORY: "memory, MB",
    "process_open_fds": "file descriptors",
    "tern:asyncio_tasks": "tasks",
    "tern:threads": "threads",
    "vllm:kv_cache_usage_perc": "KV blocks in use, share",
}
MORE = {"process_open_fds": 4, "tern:asyncio_tasks": 2, "tern:threads": 8, "vllm:kv_cache_usage_perc": 0}
"""By how much each may be higher at the end than before the crowd came; the text threads start when first needed."""

MEMORY_SHARE, MEMORY_BYTES = 1.05, 32e6
"""How much more memory the last quarter may take than the first one: caches fill, and allocators keep what they had."""

SETTLE_SECONDS = 60.0


@dataclass
class Watch:
    """The server's metrics over time, each with the `seconds` since the crowd came, and how long /health took."""

    seconds: list[float] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in WATCHED})
    health_seconds: list[float] = field(default_factory=list)

    async def run(self, server: ServerProcess, period: float) -> None:
        """Sample until cancelled."""
        started = time.perf_counter()
        while True:
            asked = time.perf_counter()
            await asyncio.to_thread(httpx.get, server.url + "/health", timeout=60)
            self.health_seconds.append(time.perf_counter() - asked)
            found = await asyncio.to_thread(server.metrics)
            self.seconds.append(time.perf_counter() - started)
            for name, values in self.samples.items():
                values.append(found.get(name, 0.0))
            await asyncio.sleep(period)


@dataclass
class Soak:
    """What a soak found; `problems` are the reasons for which it failed."""

    setting: Setting
    clients: int
    minutes: float
    done: dict[str, int]
    problems: list[str]
    before: dict[str, float]
    after: dict[str, float]
    watch: Watch


async def soak(server: ServerProcess, *, clients: int, seconds: float, length: int, command: Sequence[str]) -> Soak:
    """Ask alone, let the crowd in, let it go, and compare."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as http:
        questions = []
        for question in make_questions(length):
            alone = await text_of(http, question, stream=False)
            questions.append(Question(question.path, question.body, alone or ""))
        crowd = Crowd(server.url, http, questions, length // 2, random.Random(1))
        before = _watched(await asyncio.to_thread(server.metrics))
        watch = Watch()
        watching = asyncio.create_task(watch.run(server, max(0.2, seconds / 1000)))
        until = asyncio.get_running_loop().time() + seconds
        await asyncio.gather(*(crowd.live(until) for _ in range(clients)))
        watching.cancel()
    after = await _settled(server)
    problems = [*crowd.wrong[:20], *([f"and {len(crowd.wrong) - 20} more"] if len(crowd.wrong) > 20 else [])]
    problems += leaks(before, after, watch.samples[MEMORY])
    setting = Setting.now(command)
    return Soak(setting, clients, seconds / 60, dict(crowd.done.most_common()), problems, before, after, watch)


def _watched(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics.get(name, 0.0) for name in WATCHED}


async def _settled(server: ServerProcess) -> dict[str, float]:
    """The metrics once nothing is served any more and closed connections have been noticed."""
    deadline = time.perf_counter() + SETTLE_SECONDS
    while True:
        found = await asyncio.to_thread(server.metrics)
        busy = found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"]
        if not busy or time.perf_counter() > deadline:
            await asyncio.sleep(1.0)
            return _watched(await asyncio.to_thread(server.metrics))
        await asyncio.sleep(0.2)


def leaks(before: dict[str, float], after: dict[str, float], memory: Sequence[float]) -> list[str]:
    """What was not given back, in words."""
    found = [
        f"{WATCHED[name]}: {before[name]:g} before, {after[name]:g} after"
        for name, more in MORE.items()
        if not after[name] <= before[name] + more
    ]
    quarter = max(1, len(memory) // 4)
    first, last = statistics.median(memory[:quarter]), statistics.median(memory[-quarter:])
    if not last <= first * MEMORY_SHARE + MEMORY_BYTES:
        found.append(f"memory: {first / 1e6:.0f} MB in the first quarter, {last / 1e6:.0f} MB in the last")
    return found


def soak_figure(result: Soak) -> Figure:
    """A page of what was watched, over the minutes."""
    verdict = "nothing leaked, no answer was wrong" if not result.problems else f"{len(result.problems)} problems"
    asked = sum(result.done.values())
    subtitle = f"{result.clients} clients, {result.minutes:.1f} minutes, {asked} errands: {verdict}."
    figure, panels = page("A server under mixed and hostile traffic", subtitle, result.setting, len(WATCHED))
    minutes = [second / 60 for second in result.watch.seconds]
    for axes, (name, label), colour in zip(panels, WATCHED.items(), COLOURS, strict=False):
        scale = 1e-6 if name.endswith("bytes") else 1.0
        axes.margins(y=0.1)
        axes.plot(minutes, [value * scale for value in result.watch.samples[name]], color=colour, linewidth=0.9)
        finish(axes, title=label, x="minutes", y="")
    return figure


def show(result: Soak) -> None:
    """What was done, what was watched and what was wrong, as text."""
    for name, count in result.done.items():
        print(f"{count:8} {name}")
    for name, label in WATCHED.items():
        unit = 1e6 if name == MEMORY else 1.0
        print(f"{label}: {result.before[name] / unit:g} before, {result.after[name] / unit:g} after")
    waits = sorted(result.watch.health_seconds)
    print(f"/health took {statistics.median(waits) * 1000:.0f} ms, at most {waits[-1] * 1000:.0f} ms")
    print("\n".join(f"PROBLEM {problem}" for problem in result.problems) or "No problem.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Soak, print, write the report, and exit with the verdict."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--model", help="a directory, hub id or dummy:PRESET; default: the embedded model")
    made.add_argument("--clients", type=int, default=50)
    made.add_argument("--minutes", type=float, default=60.0)
    made.add_argument("--max-model-len", type=int, default=1024)
    made.add_argument("--serve", default="", metavar="ARGUMENTS", help="further arguments of tern serve")
    made.add_argument("--report", metavar="FILE", help="write a picture here, or pictures and figures to a directory")
    wanted = made.parse_args(arguments)
    command = ["python", "-m", "benchmarks.soak", *(sys.argv[1:] if arguments is None else arguments)]
    serve = [*([wanted.model] if wanted.model else []), "--max-model-len", str(wanted.max_model_len)]
    serve += ["--log-level", "warning", *shlex.split(wanted.serve)]
    try:
        destination = Destination.of(wanted.report) if wanted.report else None
        with tern_serve(serve) as server:
            seconds, length = wanted.minutes * 60, wanted.max_model_len
            work = soak(server, clients=wanted.clients, seconds=seconds, length=length, command=command)
            result = asyncio.run(work)
    except TernError as error:
        made.exit(2, f"{error}\n")
    show(result)
    if destination is not None:
        report: dict[str, Any] = asdict(result)
        print(*destination.write(lambda: soak_figure(result), report))
    made.exit(1 if result.problems else 0)


if __name__ == "__main__":
    main()
