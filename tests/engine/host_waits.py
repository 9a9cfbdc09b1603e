"""Begins steps on tensors without memory, which refuse whoever would read them: a program that needs no GPU.

It prints for each step how many copies go from the host to the device.

    python -m tests.engine.host_waits
"""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.kernel_variants import model_of  # isort: skip - it decides how kernels are made

from triton.runtime.jit import JITFunction

from tern.engine.request import Request
from tern.engine.runner import BegunStep, Runner
from tern.engine.sampling_params import SamplingParams
from tern.engine.sampling_state import SamplingState
from tern.engine.scheduler import Chunk
from tern.engine.sequence import Sequence
from tern.engine.trial_steps import Nobody
from tern.ops.placement import interpreted

BLOCK, LENGTH = 16, 40
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.1},
    {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"logit_bias": {3: 1.0}, "min_tokens": 100, "temperature": 0.0},
    {"allowed_token_ids": [1, 2, 3]},
]


class Even:
    """A grammar that allows every second token."""

    ended = False

    def fill(self, mask: Any, _: object) -> bool:
        mask[:] = 0x55555555
        return True


class Copies(TorchDispatchMode):
    """Counts what goes from the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, _: object, args: tuple[Any, ...] = (), options: Any = None) -> Any:
        result = function(*args, **(options or {}))
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        from_host = any(each.device.type == "cpu" and each.dim() for each in tensors)
        self.count += from_host and isinstance(result, torch.Tensor) and result.device.type == "meta"
        return result


def sequence_of(number: int, kind: dict[str, Any], grammar: Any = None) -> Sequence:
    """A sequence of `LENGTH` tokens and one that is not computed yet."""
    params = SamplingParams(max_tokens=None, **kind)
    request = Request(str(number), (1,) * LENGTH, params, Nobody(), grammar=grammar)
    state = SamplingState(request, frozenset({2}))
    sequence = Sequence(request, max_length=1000, stop_ids=frozenset({2}), sampling=state)
    sequence.token_ids.append(5)
    sequence.num_computed_tokens = LENGTH
    blocks = range(number * 4, number * 4 + 4)
    sequence.block_table = array("q", blocks)
    return sequence


def main() -> None:
    JITFunction.run = lambda *_, **__: None
    kinds: list[tuple[dict[str, Any], Any]] = [(kind, None) for kind in KINDS]
    kinds.append(({}, Even()))
    sequences = [sequence_of(number, *kind) for number, kind in enumerate(kinds)]
    decodes = [Chunk(sequence, 1, samples=True) for sequence in sequences]
    drafts = [Chunk(sequence, 1, samples=True, drafts=(7, 8)) for sequence in sequences[:2]]
    prompt = sequence_of(9, {})
    prompt.num_computed_tokens = 0
    with interpreted():
        model = model_of("none")
        for captured in (True, False):
            runner = Runner(
                model,
                num_blocks=64,
                block_size=BLOCK,
                kv_dtype=torch.bfloat16,
                max_num_seqs=8,
                max_model_len=1000,
                max_drafts=2,
                capture=(lambda compute: compute) if captured else None,
            )
            name = "graphs" if captured else "eager"
            first = counted(f"{name} decode", runner, decodes)
            counted(f"{name} follow", runner, decodes[:3], first)
            counted(f"{name} drafts", runner, drafts)
            counted(f"{name} prompt", runner, [Chunk(prompt, LENGTH, samples=True), *decodes])


def counted(name: str, runner: Runner, chunks: list[Chunk], after: BegunStep | None = None) -> BegunStep:
    with Copies() as copies:
        begun = runner.begin(chunks, after)
    print(name, copies.count)
    return begun


if __name__ == "__main__":
    main()
