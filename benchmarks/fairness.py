"""How long decoders pause for a token, alone and while a long prompt is read beside them.

    python -m benchmarks.fairness --model PACKED --decoders 4 --prompt-tokens 32768 --option target_step_seconds=0.5

The engine itself decodes `--decoders` sequences, first alone, then with one prompt of `--prompt-tokens` random tokens
beside them, until that has its first token or `--minutes` have passed. Stated are the p50, p99 and longest time between
two tokens of a decoder, and how fast the prompt was read; the same without any aim for a step shows what the aim costs
and gives.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from benchmarks.long_context import options, tokens
from tern.bench import Setting
from tern.checkpoint import resolve_model
from tern.engine import CONTINUE, Engine, EngineOptions, Finish, GeneratedToken, Request, SamplingParams, Steering
from tern.errors import OptionError, TernError

ALONE_TOKENS = 32
"""What each decoder writes before the prompt comes."""


@dataclass(frozen=True)
class Pauses:
    """Seconds between two tokens of a decoder."""

    p50: float
    p99: float
    longest: float

    @classmethod
    def of(cls, moments: Sequence[Sequence[float]]) -> Pauses:
        """The pauses of all decoders together, from the moments of their tokens."""
        gaps = sorted(later - earlier for times in moments for earlier, later in pairwise(times))
        if not gaps:
            raise OptionError("No decoder wrote two tokens while the prompt was read: give a longer --prompt-tokens.")
        return cls(gaps[len(gaps) // 2], gaps[int(0.99 * (len(gaps) - 1))], gaps[-1])


@dataclass(frozen=True)
class Fairness:
    """The pauses of decoders without and with a long prompt beside them, and how much of it was read how fast."""

    alone: Pauses
    beside: Pauses
    prompt_tokens: int
    prompt_tokens_per_s: float


@dataclass
class _Moments:
    """A sink that notes when tokens came."""

    times: list[float] = field(default_factory=list)

    def push(self, token: GeneratedToken) -> Steering:  # noqa: ARG002
        self.times.append(time.perf_counter())
        return CONTINUE

    def finish(self, finish: Finish) -> None:
        pass


def measure(engine: Engine, decoders: int, prompt_tokens: int, most_seconds: float) -> Fairness:
    """Decode alone, then beside a prompt, which is read for `most_seconds`.

    Raises `OptionError` if the engine is too small for that.
    """
    room = engine.max_model_len - prompt_tokens
    if room < 2 or decoders >= engine.options.max_num_seqs:
        raise OptionError(
            f"--decoders {decoders} and --prompt-tokens {prompt_tokens} do not fit an engine of "
            f"{engine.options.max_num_seqs} sequences of {engine.max_model_len} tokens."
        )
    sinks = [_Moments() for _ in range(decoders)]
    for number, sink in enumerate(sinks):
        prompt = tuple(tokens(16 + number, engine.vocab_size))
        endless = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=None)
        engine.add(Request(f"decoder {number}", prompt, endless, sink))
    _step_until(engine, lambda: min(len(sink.times) for sink in sinks) >= ALONE_TOKENS)
    alone = [list(sink.times) for sink in sinks]
    reader, started = _Moments(), time.perf_counter()
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1)
    long = random.Random(1).choices(range(3, engine.vocab_size), k=prompt_tokens)
    engine.add(Request("long", tuple(long), params, reader))
    _step_until(engine, lambda: bool(reader.times) or time.perf_counter() - started > most_seconds)
    seconds = time.perf_counter() - started
    read = prompt_tokens if reader.times else engine.sequences["long"].num_computed_tokens
    beside = [sink.times[len(before) - 1 :] for sink, before in zip(sinks, alone, strict=True)]
    for name in list(engine.sequences):
        engine.cancel(name)
    return Fairness(Pauses.of(alone), Pauses.of(beside), read, read / seconds)


def _step_until(engine: Engine, done: Callable[[], bool]) -> None:
    while not done():
        if not engine.step():
            raise RuntimeError("the engine has nothing to do before the measurement is over")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--model", help="a directory, hub id or dummy:PRESET; default: the embedded model")
    made.add_argument("--decoders", type=int, default=4)
    made.add_argument("--prompt-tokens", type=int, default=32768)
    made.add_argument("--minutes", type=float, default=math.inf, help="most that is read of the prompt")
    made.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="one of the engine's")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    wanted = made.parse_args(arguments)
    found: dict[str, Fairness] = {}
    try:
        chosen = {"speculation": "off", **options(wanted.option)}
        engine = Engine.open(resolve_model(wanted.model), EngineOptions.from_keywords(**chosen), progress=False)
        found["with the aim"] = measure(engine, wanted.decoders, wanted.prompt_tokens, 60 * wanted.minutes)
        del engine
        chosen["target_step_seconds"] = None
        engine = Engine.open(resolve_model(wanted.model), EngineOptions.from_keywords(**chosen), progress=False)
        found["without one"] = measure(engine, wanted.decoders, wanted.prompt_tokens, 60 * wanted.minutes)
    except TernError as error:
        made.exit(2, f"{error}\n")
    setting = Setting.now(["python", "-m", "benchmarks.fairness", *(sys.argv[1:] if arguments is None else arguments)])
    print(f"{setting.processor}, {setting.memory_gb:.0f} GB, {setting.date}")
    for name, one in found.items():
        for where, pauses in (("alone", one.alone), ("beside the prompt", one.beside)):
            print(
                f"{name}, {where}: p50 {pauses.p50 * 1000:.0f} ms, p99 {pauses.p99 * 1000:.0f} ms, "
                f"longest {pauses.longest * 1000:.0f} ms"
            )
        print(f"{name}: {one.prompt_tokens} tokens of the prompt were read at {one.prompt_tokens_per_s:.1f} a second")
    if wanted.json is not None:
        figures = {"setting": asdict(setting), **{name: asdict(one) for name, one in found.items()}}
        wanted.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
