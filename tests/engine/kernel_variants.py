"""Which kernels steps of the 21B model are compiled to on a Hopper GPU: a program that needs none and computes nothing.

It prints the name of each kernel, how many of it the steps at the start ask for, how many all steps ask for, and how
many of those the start does not: those would be compiled while somebody waits.

    python -m tests.engine.kernel_variants QUANTIZATION
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)

from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction, compute_cache_key  # noqa: E402

from tern import ops  # noqa: E402
from tern.checkpoint.presets import PRESETS  # noqa: E402
from tern.checkpoint.quantisation import packed_bits  # noqa: E402
from tern.engine.runner import SCORED_ROWS  # noqa: E402
from tern.engine.warm_up import powers_of_two, warm_up_steps  # noqa: E402
from tern.model import ErnieConfig, ErnieModel  # noqa: E402
from tern.model.batch import Batch, KVCache  # noqa: E402
from tern.model.parameters import float32_parameters, parameter_shapes  # noqa: E402
from tern.ops.gpu_weights import BLOCK, Fp8Weight, Weight  # noqa: E402
from tern.ops.placement import interpreted  # noqa: E402
from tests.ops.cuda.compile_for_hopper import Hopper  # noqa: E402

MOST_TOKENS, MOST_SEQUENCES, LONGEST = 8192, 256, 131072
Lengths = list[int]


def model_of(quantization: str) -> ErnieModel:
    """A dense layer and one of experts, in the sizes of the 21B model, of tensors without memory."""
    config = ErnieConfig.from_dict(PRESETS["ernie-4.5-21b-a3b"] | {"num_hidden_layers": 2})
    tensors: dict[str, Weight] = {}
    for name, shape in parameter_shapes(config).items():
        if quantization != "none" and packed_bits(name, quantization) is not None:
            scales = torch.empty(*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK), device="meta")
            tensors[name] = Fp8Weight(torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta"), scales)
        else:
            dtype = torch.float32 if name in float32_parameters(config) else torch.bfloat16
            tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
    return ErnieModel(config, tensors)


def compute(model: ErnieModel, kv: KVCache, lengths: Lengths) -> None:
    """A step of prompts of these lengths, or of decodes where they are 1, as the runner computes it without graphs."""
    tokens, sequences = sum(lengths), len(lengths)
    rows, each = torch.zeros(tokens, dtype=torch.int64, device="meta"), rows_of(sequences)
    batch = Batch(
        token_ids=rows,
        positions=rows,
        slots=rows,
        query_starts=rows_of(sequences + 1),
        context_lens=each,
        block_tables=each[:, None].expand(sequences, -(-max(lengths) // 16)).contiguous(),
        logit_rows=each,
        max_query_len=max(lengths),
        max_context_len=max(lengths),
    )
    logits = model.logits(model.hidden(batch, kv).index_select(0, batch.logit_rows))
    peaks, *_ = ops.largest(logits)
    numbers = torch.empty(sequences, dtype=torch.float64, device="meta")
    ops.draw(logits, peaks, ops.Draws(numbers, peaks, numbers, batch.logit_rows, numbers))


def rows_of(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.int64, device="meta")


def all_steps() -> Iterable[Lengths]:
    """Steps of all kinds: prompts alone, decodes, both, and sequences of few tokens each."""
    for tokens in [*range(1, 1100), *range(1100, MOST_TOKENS + 1, 101), *range(1104, MOST_TOKENS + 1, 112)]:
        yield [tokens]
        if tokens % 7 == 0:
            yield [tokens - 5, *[1] * 5]
    for sequences in range(1, MOST_SEQUENCES + 1):
        yield [1] * sequences
    for few in range(2, 14):
        for sequences in (1, 2, 3, 16, 100):
            yield [few] * sequences


def main(quantization: str) -> None:
    driver.set_active(Hopper())
    keys: dict[str, set[str]] = defaultdict(set)

    def noted(function: Any, *args: Any, grid: object, warmup: bool, **options: Any) -> None:  # noqa: ARG001
        _, specialization, chosen = function.device_caches[0][-1](*args, **options)
        keys[f"{function.__module__}.{function.__name__}"].add(compute_cache_key({}, specialization, chosen))

    JITFunction.run = noted
    with interpreted():  # else tensors without memory would be the processor's
        model = model_of(quantization)
        kv = KVCache.allocate(
            model.config, num_blocks=4096, block_size=16, dtype=torch.bfloat16, device=torch.device("meta")
        )
        for lengths in warm_up_steps(MOST_SEQUENCES, MOST_TOKENS, LONGEST - 1):
            compute(model, kv, lengths)
        for rows in powers_of_two(SCORED_ROWS):
            model.logits(torch.empty(rows, model.config.hidden_size, dtype=torch.bfloat16, device="meta"))
        at_start = {name: set(found) for name, found in keys.items()}
        for lengths in all_steps():
            compute(model, kv, lengths)
    for name, found in sorted(keys.items()):
        print(name, len(at_start.get(name, ())), len(found), len(found - at_start.get(name, set())))


if __name__ == "__main__":
    main(sys.argv[1])
