"""What `benchmarks.gpu` measures, by importance, and the least time for each row. Knows sizes; measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tern.bench import Limits, Work, step_work
from tern.bench.gpu import weight_sizes
from tern.bench.limits import Sized
from tern.bench.overhead import ROOM
from tern.bench.report import GPU_CHUNK, prompt_chunks
from tern.engine.cache_size import token_bytes
from tern.model import ErnieConfig

CACHE_DTYPES = {"auto": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
TERN, TRANSFORMERS = "Tern", "transformers"


@dataclass(frozen=True)
class Row:
    """One figure of the table.

    "decode": a token for each of `sequences` that hold `depth` tokens; "prefill": a prompt of `tokens`, tokens a
    second; "first token": the same, seconds. `quantization` None is bfloat16. `target`: the best that is published for
    models of this class on one such GPU, in any precision, None where nothing is. `seconds`: what measuring takes on an
    H200 without loading, about.
    """

    kind: str
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    sequences: int = 1
    tokens: int = 1
    depth: int = 0
    target: float | None = None
    seconds: float = 20.0
    engine: str = TERN

    @property
    def label(self) -> str:
        """The row in words."""
        together = "1 sequence" if self.sequences == 1 else f"{self.sequences} sequences"
        work = {
            "decode": f"decode {together} at depth {self.depth}",
            "prefill": f"prefill {self.tokens}",
            "first token": f"prompt of {self.tokens} to its first token",
        }[self.kind]
        cache = "" if self.kv_cache_dtype == "auto" else f", {self.kv_cache_dtype} cache"
        name = "" if self.engine == TERN else f", {self.engine}"
        return f"{work}, {self.quantization or 'bf16'}{cache}{name}"

    @property
    def unit(self) -> str:
        """What its figure counts."""
        return "s" if self.kind == "first token" else "tokens/s"

    def figure(self, seconds: float) -> float:
        """The figure of a step, or a prompt, that takes so many seconds."""
        if self.kind == "first token":
            return seconds
        return self.sequences * self.tokens / seconds

    def work(self, config: ErnieConfig, weights: Mapping[str, Sized]) -> list[Work]:
        """The least that its steps must do, one after the other."""
        kv_token_bytes = token_bytes(config, CACHE_DTYPES[self.kv_cache_dtype])
        return [
            step_work(
                config,
                weights,
                sequences=self.sequences,
                tokens=count,
                depth=self.depth + start,
                kv_token_bytes=kv_token_bytes,
            )
            for start, count in prompt_chunks(self.tokens, GPU_CHUNK)
        ]


def plan(*, batches: Sequence[int], batch_depth: int, prefill: int, context: int) -> list[Row]:
    """The rows in order of importance: `batches` sequences that decode together at `batch_depth`, a prompt of `prefill`
    tokens, and one sequence of `context`.
    """
    deep = max(0, context - ROOM)  # as deep as leaves room to decode
    published = {32: 2765.0, 256: 13890.0}  # gpt-oss-20b: SGLang on an H100; TensorRT-LLM on an H200, full load
    rows = [Row("decode", quantization, target=222.0) for quantization in (None, "fp8", "wint4")]  # Qwen3-30B-A3B
    for number, sequences in enumerate(sorted(batches)):
        cache = "fp8" if number else "auto"  # of the larger ones keys and values are most of what is read
        rows += [
            Row("decode", quantization, kv, sequences, depth=batch_depth, target=published.get(sequences))
            for quantization, kv in ((None, "auto"), ("fp8", cache))
        ]
    return [
        *rows,
        Row("prefill", tokens=prefill, target=56000.0),  # Qwen3.5-35B-A3B in fp8
        *[
            Row("decode", quantization, cache, depth=deep, target=153.0)  # a hybrid 80B-A3B in fp8 at 256K
            for quantization, cache in ((None, "auto"), ("fp8", "fp8"), (None, "fp8"))
        ],
        Row("first token", tokens=context, seconds=40.0),
        Row("decode", seconds=75.0, engine=TRANSFORMERS),
    ]


@dataclass(frozen=True)
class RowLimit:
    """The figure that a row cannot pass, and what keeps it there: "reading" or "multiplying"."""

    label: str
    figure: float
    unit: str
    bound: str


def row_limits(rows: Sequence[Row], config: ErnieConfig, limits: Limits) -> list[RowLimit]:
    """The limits of the rows on a device of these limits, without a device: see `weight_sizes`."""
    weights = {quantization: weight_sizes(config, quantization) for quantization in {row.quantization for row in rows}}
    found = []
    for row in rows:
        steps = row.work(config, weights[row.quantization])
        reading = sum(limits.reading_seconds(step) for step in steps)
        multiplying = sum(limits.multiplying_seconds(step) for step in steps)
        least = sum(step.seconds(limits) for step in steps)
        bound = "reading" if reading > multiplying else "multiplying"
        found.append(RowLimit(row.label, row.figure(least), row.unit, bound))
    return found
