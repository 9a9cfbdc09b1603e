"""Tokens a second with drafts and without, on a real checkpoint with a prompt or on random weights.

    python -m benchmarks.speculation --model DIR --prompt FILE              # both methods against none
    python -m benchmarks.speculation --model dummy:PRESET --told 0.95 0.7   # and what an acceptance would give

Random weights say nothing that is worth drafting. There `--told` drafts what the answer is known to be, each token
right with the given chance, so that the cost of rows is measured against a chosen acceptance; `--drafts` of them a
step, whether they pay or not. A `dummy:` of a config.json with `num_nextn_predict_layers` 1 has a predictor to time.
The runs alternate, one warm-up each is not counted, and answers that differ are an error.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from pathlib import Path

from tern.chat import ChatProtocol
from tern.checkpoint import resolve_model
from tern.checkpoint.loader import load_model
from tern.engine import (
    CONTINUE,
    Engine,
    EngineOptions,
    Finish,
    GeneratedToken,
    Request,
    SamplingParams,
    Steering,
)
from tern.engine.sequence import Sequence
from tern.model import ErnieModel


@dataclass
class Answer:
    """A sink that keeps tokens and the time between the first and the last."""

    token_ids: list[int] = field(default_factory=list)
    began: float = 0.0
    seconds: float = 0.0

    def push(self, token: GeneratedToken) -> Steering:
        """Keep a token."""
        self.began = self.began or time.perf_counter()
        self.token_ids.append(token.token_id)
        return CONTINUE

    def finish(self, _: Finish) -> None:
        """Stop the clock."""
        self.seconds = time.perf_counter() - self.began


class Told:
    """Drafts from a known answer, each right with `chance`."""

    def __init__(self, answer: Ordered[int], chance: float, count: int) -> None:
        self._answer = answer
        self._chance = chance
        self._count = count
        self._toss = random.Random(1)

    def draft(self, sequences: Ordered[Sequence], room: int) -> list[tuple[int, ...]]:
        """The next tokens of the answer for the only sequence."""
        (sequence,) = sequences
        done = sequence.num_generated_tokens
        known = self._answer[done : done + min(self._count, room, sequence.num_draftable_tokens)]
        return [tuple(token if self._toss.random() < self._chance else token ^ 1 for token in known)]


@dataclass
class Way:
    """One way to speculate, and what its runs gave."""

    name: str
    engine: Engine
    told: float | None = None
    rates: list[float] = field(default_factory=list)


def run_once(way: Way, prompt: tuple[int, ...], plain: list[int], args: argparse.Namespace) -> list[int]:
    """One answer; its tokens a second are noted, from the first token to the last."""
    if way.told is not None:
        way.engine.scheduler.drafter = Told(plain, way.told, args.drafts)
    params = SamplingParams(temperature=args.temperature, seed=1, max_tokens=args.tokens, ignore_eos=True)
    answer = Answer()
    way.engine.add(Request("run", prompt, params, answer))
    while way.engine.step():
        pass
    way.rates.append((len(answer.token_ids) - 1) / answer.seconds)
    return answer.token_ids


def ways(model: ErnieModel, args: argparse.Namespace) -> list[Way]:
    """The plain way first, then each method the model has, then each told acceptance."""

    def engine(speculation: str) -> Engine:
        options = EngineOptions(
            max_model_len=args.max_model_len,
            max_num_seqs=1,
            speculation=speculation,
            num_speculative_tokens=args.drafts if speculation == "ngram" else None,
        )
        return Engine(model, (), options)

    methods = ["off", "ngram", *(["mtp", "auto"] if model.mtp is not None else [])]
    told = [Way(f"told {chance:.0%}", engine("off"), chance) for chance in args.told]
    return [*(Way(method, engine(method)) for method in methods), *told]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="directory, hub id or dummy:PRESET; default: the embedded model")
    parser.add_argument("--quantization", help="wint4 or wint8: pack weights while loading")
    parser.add_argument("--prompt", type=Path, help="a text file that asks for something; default: random tokens")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--drafts", type=int, default=4, help="most drafts a step, of ngram and --told")
    parser.add_argument("--told", type=float, nargs="*", default=[], help="chances with which told drafts are right")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-model-len", type=int, default=4096)
    args = parser.parse_args()

    source = resolve_model(args.model)
    if args.prompt is None:
        toss = random.Random(0)
        prompt = tuple(toss.randrange(3, source.config.vocab_size) for _ in range(64))
    else:
        chat = ChatProtocol.from_directory(source.directory)
        rendered = chat.prompt([{"role": "user", "content": args.prompt.read_text(encoding="utf-8")}])
        prompt = tuple(rendered.token_ids)
    model = load_model(source, quantization=args.quantization)
    runs = ways(model, args)
    plain: list[int] = []
    for _ in range(args.repeats + 1):
        for way in runs:
            answer = run_once(way, prompt, plain, args)
            plain = plain or answer
            if answer != plain:
                raise SystemExit(f"{way.name} gives another answer than no speculation: a defect of Tern.")
    report(runs)


def report(runs: list[Way]) -> None:
    """A line a way: the median, its ratio to the plain way, and how many drafts were right."""
    base = statistics.median(runs[0].rates[1:])
    print(f"{'speculation':12} {'tokens/s':>9} {'ratio':>6} {'drafted':>8} {'right':>6} {'tokens/step':>12}")
    for way in runs:
        stats, rate = way.engine.stats(), statistics.median(way.rates[1:])
        right = f"{stats.accepted_tokens / stats.drafted_tokens:.0%}" if stats.drafted_tokens else "-"
        a_step = stats.generated_tokens / stats.steps
        print(f"{way.name:12} {rate:9.1f} {rate / base:6.2f} {stats.drafted_tokens:8} {right:>6} {a_step:12.2f}")


if __name__ == "__main__":
    main()
