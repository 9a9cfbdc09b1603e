"""Tern beside vLLM on the processor of one machine: `python -m benchmarks.compare_vllm_cpu --help`.

vLLM runs in an environment of its own, on random int4 weights (AWQ, groups of 128) of the shape of Tern's model. It
takes minutes to load, and it is loaded in every round: with Tern's model it would not fit the machine.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparison import Figures, ProgramError, Tern, Wanted, Work, carry_out, parser, run
from tern.checkpoint import ModelSource, resolve_model

SCRIPT = Path(__file__).with_name("vllm_steps.py")
AWQ: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["gate", "lm_head"],
}
ROOM = 64
"""Tokens that a context grows by while it is timed, rounded up."""


class VllmCpu:
    """vLLM in the environment whose Python is `python`, on `processors` (such as 0-1), with `cache_gb` GiB of cache."""

    name = "vLLM-CPU"

    def __init__(self, python: str, source: ModelSource, processors: str, cache_gb: int, wanted: Wanted) -> None:
        self.python, self.source, self.wanted = python, source, wanted
        self.environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": str(cache_gb),
            "VLLM_CPU_OMP_THREADS_BIND": processors,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the steps are taken, and timed, in the process itself
            "HF_HUB_OFFLINE": "1",
        }

    def measure(self) -> Figures:
        """Load once and time everything."""
        with tempfile.TemporaryDirectory() as folder:
            config = {**self.source.raw_config, "architectures": [_architecture(self.source)]}
            (Path(folder) / "config.json").write_text(json.dumps({**config, "quantization_config": AWQ}))
            output = Path(folder) / "measured.json"
            run([self.python, str(SCRIPT), json.dumps(self._work(folder)), str(output)], self.environment)
            if not output.exists():
                raise ProgramError(f"{self.python} measured nothing: check that vllm runs in its environment.")
            return self._figures(json.loads(output.read_text(encoding="utf-8")))

    def _work(self, folder: str) -> dict[str, Any]:
        wanted = self.wanted
        return {
            "folder": folder,
            "vocab_size": self.source.config.vocab_size,
            "most_tokens": max([*wanted.prefill, *wanted.depths, wanted.batch_depth]) + ROOM,
            "prefill": wanted.prefill,
            "depths": wanted.depths,
            "sequences": wanted.sequences,
            "batch_depth": wanted.batch_depth,
        }

    def _figures(self, measured: dict[str, Any]) -> Figures:
        figures = {Work("prefill", tokens=int(length)): speed for length, speed in measured["prefill"].items()}
        figures |= {Work("decode", depth=int(depth)): speed for depth, speed in measured["depths"].items()}
        batched = measured["sequences"].items()
        depth = self.wanted.batch_depth
        figures |= {Work("decode", sequences=int(count), depth=depth): speed for count, speed in batched}
        if self.wanted.start:
            figures[Work("start")] = measured["start"]
        return figures


def _architecture(source: ModelSource) -> str:
    """The class name by which vLLM finds the network."""
    return "Ernie4_5_MoeForCausalLM" if source.config.moe_num_experts else "Ernie4_5ForCausalLM"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and print."""
    made = parser("Tern beside vLLM on this machine's processor: medians and ratios of alternating runs.")
    made.add_argument("--python", required=True, help="the Python of an environment with vllm-cpu")
    made.add_argument("--processors", default=f"0-{(os.cpu_count() or 1) - 1}", help="those that vLLM binds to")
    made.add_argument("--cache-gb", type=int, default=3, help="vLLM's KV cache, GiB")
    found = made.parse_args(arguments)
    wanted = Wanted(found.prefill, found.depths, found.sequences, batch_depth=16, start=found.start)
    vllm = VllmCpu(found.python, resolve_model(found.model), found.processors, found.cache_gb, wanted)
    carry_out(Tern(found.model, found.tern_options, wanted), vllm, found)


if __name__ == "__main__":
    main()
