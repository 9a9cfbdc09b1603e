"""A server's tokens a second beside those of the offline engine, on the same requests.

    python -m benchmarks.throughput --model MODEL --requests 64 --prompt-tokens 128 --output-tokens 128

Prompts are random token ids, greedy, eos ignored; all requests are sent at once, streamed, and timed from the first one
sent to the last one ended. Both engines have the same options, and no prefix cache. The two alternate; the ratio is
made within a round. What a server's aim for a step costs is no part of that ratio: both have the same aim, a
server's own or `--target-step-seconds`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.server_process import ServerProcess, tern_serve
from tern.bench import Setting
from tern.checkpoint import resolve_model
from tern.engine import CONTINUE, Engine, EngineOptions, Finish, GeneratedToken, Request, SamplingParams, Steering
from tern.errors import RemoteServerError, TernError

FIRST_TOKEN = 3
"""Token ids below are special in every network of the family."""


@dataclass(frozen=True)
class Round:
    """Output tokens a second, offline and through the server."""

    offline: float
    server: float

    @property
    def ratio(self) -> float:
        """The server's share of the offline engine's speed."""
        return self.server / self.offline


class _Count:
    """A sink that only counts."""

    tokens = 0

    def push(self, token: GeneratedToken) -> Steering:  # noqa: ARG002
        self.tokens += 1
        return CONTINUE

    def finish(self, finish: Finish) -> None:
        pass


def offline(engine: Engine, prompts: Sequence[list[int]], tokens: int) -> float:
    """Output tokens a second of the engine alone."""
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=tokens)
    sink = _Count()
    started = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), tuple(prompt), params, sink))
    while engine.step():
        pass
    return sink.tokens / (time.perf_counter() - started)


async def through_server(server: ServerProcess, prompts: Sequence[list[int]], tokens: int) -> float:
    """Output tokens a second as the server's clients count them. Raises `RemoteServerError` if one is not answered."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as client:

        async def ask(prompt: list[int]) -> int:
            body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
            body["stream_options"] = {"include_usage": True}
            usage = None
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if '"usage":{' in line:
                        usage = json.loads(line.removeprefix("data: "))["usage"]
            if usage is None:
                raise RemoteServerError(f"The server answered {response.status_code} to a request of the benchmark.")
            return int(usage["completion_tokens"])

        started = time.perf_counter()
        counts = await asyncio.gather(*map(ask, prompts))
        return sum(counts) / (time.perf_counter() - started)


def measure(model: str | None, wanted: argparse.Namespace) -> list[Round]:
    """The rounds, without the first of each, which warms up."""
    source = resolve_model(model)
    sizes: dict[str, Any] = {
        "max_num_seqs": wanted.max_num_seqs,
        "max_model_len": wanted.prompt_tokens + wanted.output_tokens + 1,
    }
    sizes["target_step_seconds"] = wanted.target_step_seconds
    options = EngineOptions.for_one_caller(**sizes, enable_prefix_caching=False, quantization=wanted.quantization)
    engine = Engine.open(source, options, progress=False)
    draw = random.Random(0)
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    arguments += ["--no-enable-prefix-caching", "--log-level", "warning", "--max-queue", str(2 * wanted.requests)]
    if wanted.quantization:
        arguments += ["--quantization", wanted.quantization]
    rounds = []
    with tern_serve([*([model] if model else []), *arguments]) as server:
        for _ in range(wanted.rounds + 1):
            prompts = [
                draw.choices(range(FIRST_TOKEN, source.config.vocab_size), k=wanted.prompt_tokens)
                for _ in range(wanted.requests)
            ]
            alone = offline(engine, prompts, wanted.output_tokens)
            rounds.append(Round(alone, asyncio.run(through_server(server, prompts, wanted.output_tokens))))
    return rounds[1:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--model", help="a directory, hub id or dummy:PRESET; default: the embedded model")
    made.add_argument("--quantization", help="wint4 or wint8: pack weights while loading")
    made.add_argument("--requests", type=int, default=64)
    made.add_argument("--prompt-tokens", type=int, default=128)
    made.add_argument("--output-tokens", type=int, default=128)
    made.add_argument("--max-num-seqs", type=int, default=32)
    made.add_argument("--target-step-seconds", type=float, default=EngineOptions().target_step_seconds)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    wanted = made.parse_args(arguments)
    try:
        rounds = measure(wanted.model, wanted)
    except TernError as error:
        made.exit(2, f"{error}\n")
    setting = Setting.now(
        ["python", "-m", "benchmarks.throughput", *(sys.argv[1:] if arguments is None else arguments)]
    )
    print(f"{setting.processor}, {setting.memory_gb:.0f} GB, {setting.date}")
    for one in rounds:
        print(f"offline {one.offline:8.1f} tokens/s   server {one.server:8.1f} tokens/s   ratio {one.ratio:.3f}")
    print(f"median ratio {statistics.median(one.ratio for one in rounds):.3f}")
    if wanted.json is not None:
        figures = {"setting": asdict(setting), "rounds": [asdict(one) for one in rounds]}
        wanted.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
