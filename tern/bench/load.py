"""Loads a running server with requests that arrive at random, as a crowd's do. Knows time; HTTP is `load_client`'s."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from tern.bench.load_client import ENDPOINTS, LoadClient
from tern.bench.load_report import LoadReport, RateResult, RequestRecord, summarise
from tern.bench.prompts import RandomPrompts, WordCount
from tern.bench.setting import Setting
from tern.errors import OptionError


@dataclass(frozen=True)
class LoadPlan:
    """What to send where.

    For each of `rates`, in requests a second (infinity: all at once), `requests` requests arrive as a Poisson process
    does, the same for the same `seed`. Each has about `prompt_tokens` tokens of random words and asks for
    `output_tokens` tokens. `concurrency` bounds how many are open at once (None: nothing does); a request that waits
    for its turn has not been sent yet. `model` None takes the first that the server lists.

    Raises `OptionError` that names the option, the value and the limit.
    """

    url: str
    model: str | None = None
    endpoint: str = "completions"
    api_key: str | None = None
    rates: tuple[float, ...] = (math.inf,)
    requests: int = 32
    prompt_tokens: int = 512
    output_tokens: int = 128
    concurrency: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.endpoint not in ENDPOINTS:
            raise OptionError(f"--endpoint is {self.endpoint[:40]!r}: it must be one of {', '.join(ENDPOINTS)}.")
        if not self.rates or not all(rate > 0 for rate in self.rates):
            raise OptionError("--rates must be numbers above 0, or inf, as in 0.5,1,2,inf.")
        for name in ("requests", "prompt_tokens", "output_tokens", "concurrency"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 2**20:
                raise OptionError(f"--{name.replace('_', '-')} is {value}: it must be from 1 to {2**20}.")


@dataclass(frozen=True)
class LoadEvents:
    """Who hears how a run goes: of each rate as it begins, each request that ends, and each rate's figures."""

    begin: Callable[[float], None] = lambda _: None
    ended: Callable[[RequestRecord], None] = lambda _: None
    result: Callable[[RateResult], None] = lambda _: None


def arrivals(rate: float, requests: int, seed: int) -> list[float]:
    """When each request arrives, in seconds after the first: gaps are exponential with a mean of 1 / `rate`."""
    if math.isinf(rate):
        return [0.0] * requests
    draw, moments = random.Random(seed), [0.0]
    while len(moments) < requests:
        moments.append(moments[-1] + draw.expovariate(rate))
    return moments


def run_load(plan: LoadPlan, *, command: Sequence[str] = (), events: LoadEvents | None = None) -> LoadReport:
    """Carry the plan out. Ctrl-C ends it early: the report then holds what was measured so far.

    Raises `RemoteServerError` if the server cannot be reached or refuses the first prompts, `OptionError` if it does
    not serve the model; requests that fail later are counted.
    """
    return asyncio.run(_run(plan, command, events or LoadEvents()))


async def _run(plan: LoadPlan, command: Sequence[str], events: LoadEvents) -> LoadReport:
    client = LoadClient(plan.url, plan.endpoint, plan.api_key)
    results: list[RateResult] = []
    interrupted = False
    async with AsyncExitStack() as stack:
        stack.push_async_callback(client.close)
        await client.choose_model(plan.model)
        prompts = RandomPrompts(plan.seed)
        words = await _measure_words(client, prompts, plan.prompt_tokens)
        for place, rate in enumerate(plan.rates):
            events.begin(rate)
            texts = [prompts.text(words, f"{place}/{number}") for number in range(plan.requests)]
            run = _RateRun(plan, client, texts, rate, events.ended)
            try:
                await run.send_all()
            except asyncio.CancelledError:  # Ctrl-C; whatever else might cancel wants the same: what there is
                interrupted = True
            result = summarise(None if math.isinf(rate) else rate, run.records, run.sent)
            if interrupted and not run.records:
                break
            results.append(result)
            events.result(result)
            if interrupted:
                break
    return LoadReport(
        url=client.url,
        model=client.model,
        endpoint=plan.endpoint,
        setting=Setting.now(command),
        requests=plan.requests,
        prompt_tokens=plan.prompt_tokens,
        output_tokens=plan.output_tokens,
        concurrency=plan.concurrency,
        seed=plan.seed,
        ignores_eos=client.ignores_eos,
        interrupted=interrupted,
        results=results,
    )


async def _measure_words(client: LoadClient, prompts: RandomPrompts, tokens: int) -> int:
    """How many words make so many tokens here. Sends three requests, the last as long as those that are measured."""
    count = WordCount(tokens)
    first = await client.count(prompts.text(count.first, "first"))
    words = count.words(first, await client.count(prompts.text(count.second, "second")))
    await client.count(prompts.text(words, "warm-up"))
    return words


class _RateRun:
    """The requests of one rate: those that ended in `records`, those that were sent counted in `sent`."""

    def __init__(
        self,
        plan: LoadPlan,
        client: LoadClient,
        texts: Sequence[str],
        rate: float,
        ended: Callable[[RequestRecord], None],
    ) -> None:
        self.plan, self.client, self.texts, self.ended = plan, client, texts, ended
        self.moments = arrivals(rate, plan.requests, plan.seed)
        self.places = asyncio.Semaphore(plan.concurrency or plan.requests)
        self.records: list[RequestRecord] = []
        self.sent = 0

    async def send_all(self) -> None:
        """Send each request at its moment, and return when all have ended."""
        begun = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            for text, moment in zip(self.texts, self.moments, strict=True):
                group.create_task(self._send(text, begun + moment))

    async def _send(self, text: str, moment: float) -> None:
        await asyncio.sleep(moment - asyncio.get_running_loop().time())
        async with self.places:
            self.sent += 1
            record = await self.client.ask(text, self.plan.output_tokens)
        self.records.append(record)
        self.ended(record)
