"""One long sequence: how fast it is read, how fast it goes on at several depths, and what memory it takes.

    python -m benchmarks.long_context --model PACKED --depths 4096,32768,131000 [--option NAME=VALUE ...]

The engine itself reads the whole context, in its own steps; between two depths the sequence is lengthened by forced
tokens, so that nothing is read twice. `--option` passes any option of the engine on.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.comparison import numbers
from tern.bench import Setting
from tern.bench.report import peak_rss
from tern.checkpoint import resolve_model
from tern.engine import CONTINUE, Engine, EngineOptions, Finish, GeneratedToken, Request, SamplingParams, Steering
from tern.errors import OptionError, TernError

WARM_UP, TIMED = 3, 16
STEPS = WARM_UP + TIMED
FIRST_TOKEN = 3
"""Token ids below are special in every network of the family."""


@dataclass(frozen=True)
class Depth:
    """At `depth` tokens: `read_s` seconds for the `read_tokens` since the depth before, the speeds of that and of the
    median decode step, and the most memory the process has held, 10^9 bytes.
    """

    depth: int
    read_tokens: int
    read_s: float
    read_tokens_per_s: float
    decode_tokens_per_s: float
    peak_rss_gb: float


class Lengthener:
    """A sink that, after `STEPS` tokens at a depth, forces as many as lead to the next, and in the end stops."""

    def __init__(self, depths: Sequence[int], vocab_size: int) -> None:
        self.depths, self.vocab_size = list(depths), vocab_size
        self.at = 0
        self.sampled = 0
        self.ended: Finish | None = None

    def push(self, token: GeneratedToken) -> Steering:
        if token.forced:
            return CONTINUE
        self.sampled += 1
        if self.sampled < STEPS + 1:  # the first one comes with the last of the prompt
            return CONTINUE
        self.sampled, self.at = 0, self.at + 1
        if self.at == len(self.depths):
            return Steering(stop=True)
        return Steering(
            force=tuple(tokens(self.depths[self.at] - self.depths[self.at - 1] - STEPS - 1, self.vocab_size))
        )

    def finish(self, finish: Finish) -> None:
        self.ended = finish


def tokens(count: int, vocab_size: int) -> list[int]:
    """Random ids, the same ones for the same count."""
    return random.Random(count).choices(range(FIRST_TOKEN, vocab_size), k=count)


def measure(engine: Engine, depths: Sequence[int]) -> list[Depth]:
    """Read and decode up to each of the depths, which rise by more than `STEPS` + 1 tokens.

    Raises `OptionError` if they do not, or go beyond the engine's length.
    """
    gaps = [later - earlier for earlier, later in zip([0, *depths], depths, strict=False)]
    if not depths or min(gaps[1:], default=STEPS + 2) <= STEPS + 1 or gaps[0] < 1:
        raise OptionError(f"--depths is {list(depths)}: they must rise by more than {STEPS + 1} from one to the next.")
    if depths[-1] + STEPS + 1 > engine.max_model_len:
        raise OptionError(
            f"--depths goes to {depths[-1]}, but sequences have at most {engine.max_model_len} tokens, of which "
            f"{STEPS + 1} are decoded: go to {engine.max_model_len - STEPS - 1} at most."
        )
    sink = Lengthener(depths, engine.vocab_size)
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=engine.max_model_len - depths[0])
    engine.add(Request("long", tuple(tokens(depths[0], engine.vocab_size)), params, sink))
    found = []
    for number, depth in enumerate(depths):
        computed = engine.stats().computed_tokens
        started = time.perf_counter()
        while sink.sampled == 0 and sink.at == number and sink.ended is None:
            engine.step()
        read = time.perf_counter() - started
        read_tokens = engine.stats().computed_tokens - computed
        steps = []
        while sink.at == number and sink.ended is None:
            started = time.perf_counter()
            engine.step()
            steps.append(time.perf_counter() - started)
        if sink.ended is not None and sink.at < len(depths):
            raise RuntimeError(f"the sequence ended at {number} of {len(depths)} depths: {sink.ended}")
        speed = 1 / statistics.median(steps[WARM_UP:])
        found.append(Depth(depth, read_tokens, read, read_tokens / read, speed, peak_rss() / 1e9))
    return found


def options(pairs: Sequence[str]) -> dict[str, object]:
    """Engine options as they are typed, NAME=VALUE: numbers, true and false are what they look like."""
    found: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(f"--option is {pair!r}: write NAME=VALUE, as in kv_cache_memory=8000000000.")
        words: dict[str, object] = {"true": True, "false": False}
        found[name.replace("-", "_")] = _number(value) if value[:1].isdecimal() else words.get(value, value)
    return found


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    made = argparse.ArgumentParser(description="Reading, decoding and memory of one long sequence.")
    made.add_argument("--model", required=True, help="a directory, hub id or dummy:PRESET")
    made.add_argument("--depths", type=numbers, default=[4096, 32768], help="tokens in the cache, rising")
    made.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="one of the engine's")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    wanted = made.parse_args(arguments)
    try:
        chosen = {"max_num_seqs": 1, "speculation": "off", **options(wanted.option)}
        engine = Engine.open(resolve_model(wanted.model), EngineOptions.from_keywords(**chosen))
        found = measure(engine, wanted.depths)
    except TernError as error:
        made.exit(2, f"{error}\n")
    setting = Setting.now(["python", "-m", "benchmarks.long_context", "--model", wanted.model])
    print(f"{setting.processor}, {setting.memory_gb:.0f} GB, {setting.date}; {chosen}")
    for depth in found:
        print(
            f"depth {depth.depth:>7}: read {depth.read_tokens} tokens at {depth.read_tokens_per_s:.1f} tokens/s, "
            f"decode {depth.decode_tokens_per_s:.2f} tokens/s, at most {depth.peak_rss_gb:.1f} GB of memory"
        )
    if wanted.json is not None:
        figures = {"setting": asdict(setting), "options": chosen, "depths": [asdict(depth) for depth in found]}
        wanted.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
