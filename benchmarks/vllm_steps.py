"""Times vLLM's own engine steps inside its environment: started by `benchmarks.compare_vllm_cpu`, imports nothing else.

Random int4 weights in the shape of a config.json, random tokens, greedy, eos ignored. vLLM 0.32 has an int4 expert
kernel for CPUs but does not offer it to a router with a correction bias, which only chooses the experts and is no
matter of the kernel; the answer to that one question is replaced here, in this process, so that its speed shows.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from typing import Any

WARM_UP, TIMED = 4, 20


def main() -> None:
    """Read the work from the first argument, write its speeds to the file that the second names."""
    wanted = json.loads(sys.argv[1])
    started = time.perf_counter()
    from vllm import LLM
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    cpu_moe.CPUExpertsInt4._supports_routing_method = staticmethod(lambda *_: True)
    llm = LLM(
        model=wanted["folder"],
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=wanted["most_tokens"],
        max_num_seqs=max([1, *wanted["sequences"]]),
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
    )
    steps(llm, wanted, sequences=1, length=16, new=1)
    measured: dict[str, Any] = {"start": time.perf_counter() - started, "prefill": {}, "depths": {}, "sequences": {}}
    for length in wanted["prefill"]:
        steps(llm, wanted, sequences=1, length=length, new=1)
        measured["prefill"][length] = length / sum(steps(llm, wanted, sequences=1, length=length, new=1))
    for depth in wanted["depths"]:
        measured["depths"][depth] = decode(llm, wanted, sequences=1, depth=depth)
    for sequences in wanted["sequences"]:
        measured["sequences"][sequences] = decode(llm, wanted, sequences=sequences, depth=wanted["batch_depth"])
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(measured, file)


def decode(llm: Any, wanted: dict[str, Any], *, sequences: int, depth: int) -> float:
    """Tokens a second of all sequences together: the median step once all of them decode."""
    taken = steps(llm, wanted, sequences=sequences, length=max(1, depth), new=WARM_UP + TIMED)
    return sequences / statistics.median(taken[-TIMED:])


def steps(llm: Any, wanted: dict[str, Any], *, sequences: int, length: int, new: int) -> list[float]:
    """Seconds of each step of the engine, from the first to the last of these requests."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(max_tokens=new, min_tokens=new, ignore_eos=True, temperature=0, detokenize=False)
    for number in range(sequences):
        prompt = random.choices(range(3, wanted["vocab_size"]), k=length)
        engine.add_request(f"{time.monotonic_ns()}-{number}", {"prompt_token_ids": prompt}, params)
    taken = []
    while engine.has_unfinished_requests():
        started = time.perf_counter()
        engine.step()
        taken.append(time.perf_counter() - started)
    return taken


if __name__ == "__main__":
    main()
