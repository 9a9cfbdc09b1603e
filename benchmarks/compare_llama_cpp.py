"""Tern beside llama.cpp on one machine: `python -m benchmarks.compare_llama_cpp --help`.

Speeds are those that llama.cpp's own programs report: `llama-bench` for prompts and for one sequence at a depth,
`llama-batched-bench` for several. They time the mean step over a few tokens after the depth, `tern bench` the median
step at it, which for these lengths is the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.comparison import Figures, ProgramError, Tern, Wanted, Work, carry_out, parser, run, seconds_of

PROMPT, NEW = 16, 32
"""Tokens before and tokens of a batched decode."""


class LlamaCpp:
    """llama.cpp's two benchmarks on a GGUF; `options` go to both."""

    name = "llama.cpp"

    def __init__(
        self, bench: str, batched_bench: str, gguf: str, threads: int, options: Sequence[str], wanted: Wanted
    ) -> None:
        self.batched_bench, self.wanted = batched_bench, wanted
        self.shared = ["-m", gguf, "-t", str(threads), *options]
        self.bench = [bench, *self.shared, "-r", "1", "-o", "json"]

    def measure(self) -> Figures:
        """One run of each kind of work."""
        wanted, figures = self.wanted, Figures()
        if wanted.prefill:
            for result in self._timed("-p", _joined(wanted.prefill), "-n", "0"):
                figures[Work("prefill", tokens=result["n_prompt"])] = result["avg_ts"]
        if wanted.depths:
            for result in self._timed("-p", "0", "-n", str(NEW), "-d", _joined(wanted.depths)):
                figures[Work("decode", depth=result["n_depth"])] = result["avg_ts"]
        if wanted.sequences:
            figures |= self._batched()
        if wanted.start:
            figures[Work("start")] = seconds_of([*self.bench, "-p", "1", "-n", "0", "--no-warmup"])
        return figures

    def _timed(self, *arguments: str) -> list[dict[str, Any]]:
        said = run([*self.bench, *arguments])
        try:
            results: list[dict[str, Any]] = json.loads(said)
        except ValueError:
            raise ProgramError(f"{self.bench[0]} printed no JSON: give the path of llama-bench.") from None
        return results

    def _batched(self) -> Figures:
        most = max(self.wanted.sequences)
        sizes = ["-c", str(most * (PROMPT + NEW)), "-npp", str(PROMPT), "-ntg", str(NEW)]
        batched = [self.batched_bench, *self.shared, *sizes, "-npl", _joined(self.wanted.sequences)]
        lines = _objects(run([*batched, "--output-format", "jsonl"]))
        return {
            Work("decode", sequences=line["pl"], depth=self.wanted.batch_depth): line["speed_tg"]
            for line in lines
            if "speed_tg" in line
        }


def _joined(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The lines that are JSON objects, among those of a log."""
    for line in text.splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def main() -> None:
    """Compare and print."""
    made = parser("Tern beside llama.cpp: medians and ratios of alternating runs on this machine.")
    made.add_argument("--llama-bench", required=True, help="path of llama-bench")
    made.add_argument("--llama-batched-bench", required=True, help="path of llama-batched-bench")
    made.add_argument("--gguf", required=True, help="llama.cpp's model, of the same shape")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of llama.cpp; Tern's: TERN_NUM_THREADS")
    made.add_argument("--flash-attn", default="auto", help="0, 1 or auto, whichever is faster there")
    arguments = made.parse_args()
    wanted = Wanted(
        arguments.prefill, arguments.depths, arguments.sequences, batch_depth=PROMPT + NEW // 2, start=arguments.start
    )
    programs = arguments.llama_bench, arguments.llama_batched_bench
    llama = LlamaCpp(*programs, arguments.gguf, arguments.threads, ["-fa", arguments.flash_attn], wanted)
    carry_out(Tern(arguments.model, arguments.tern_options, wanted), llama, arguments)


if __name__ == "__main__":
    main()
