"""How fast transformers' `generate` decodes the same network on the same device. Knows nothing of Tern."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from tern.bench.timer import Timer

PROMPT_TOKENS, WARM_UP, TIMED = 16, 8, 32
FIRST_TOKEN = 3
"""Token ids below are special in every network of the family."""


class _Clock:
    """What transformers calls a streamer: the moment of every token."""

    def __init__(self, timer: Timer) -> None:
        self.timer = timer
        self.moments: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.moments.append(self.timer.now())

    def end(self) -> None:
        pass


@torch.inference_mode()
def seconds_per_token(raw_config: Mapping[str, Any], device: torch.device) -> float:
    """The median time between two tokens of one greedy sequence, bfloat16, random weights, as transformers comes.

    `raw_config`: what `config.json` says. Raises `ImportError` where transformers is not installed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**raw_config)
    with torch.device(device):
        made: Any = AutoModelForCausalLM
        model = made.from_config(config, dtype=torch.bfloat16).eval()
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.02, generator=generator)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    prompt = torch.randint(FIRST_TOKEN, config.vocab_size, (1, PROMPT_TOKENS), generator=generator, device=device)
    clock = _Clock(Timer(device))
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=1 + WARM_UP + TIMED,
        do_sample=False,
        streamer=clock,
    )
    moments = clock.moments[1 + WARM_UP :]  # the first is the prompt's
    if len(moments) < 2:
        raise RuntimeError(f"generate made only {len(clock.moments)} of {1 + WARM_UP + TIMED} tokens")
    return statistics.median(later - earlier for earlier, later in pairwise(moments))
