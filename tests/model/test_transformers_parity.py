"""Tern's network against transformers' own classes, on random checkpoints that sweep the config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tern.model import ErnieModel
from tests.compare import assert_close
from tests.model.ernie_fixtures import Driver, PagedSequence, canonical_tensors, tern_model, transformers_model

CASES: dict[str, dict[str, Any]] = {
    "dense": {"moe": False},
    "dense-bias": {"moe": False, "use_bias": True},
    "dense-untied": {"moe": False, "tie_word_embeddings": False},
    "dense-head-dim": {"moe": False, "head_dim": 24},
    "dense-no-gqa": {"moe": False, "num_key_value_heads": 4},
    "dense-gqa-4": {"moe": False, "num_key_value_heads": 1},
    "dense-gqa-8": {"moe": False, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16},
    "dense-theta": {"moe": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "dense-eps": {"moe": False, "rms_norm_eps": 0.1},
    "moe": {"moe": True},
    "moe-no-shared": {"moe": True, "moe_num_shared_experts": 0},
    "moe-one-shared": {"moe": True, "moe_num_shared_experts": 1},
    "moe-interval-2": {"moe": True, "num_hidden_layers": 4, "moe_layer_interval": 2},
    "moe-all-layers": {"moe": True, "moe_layer_start_index": 0},
    "moe-start-end": {"moe": True, "num_hidden_layers": 4, "moe_layer_start_index": 2, "moe_layer_end_index": 2},
    "moe-bias": {"moe": True, "use_bias": True},
    "moe-bias-untied": {"moe": True, "use_bias": True, "tie_word_embeddings": False},
    "moe-head-dim": {"moe": True, "head_dim": 32, "num_key_value_heads": 1},
    "moe-top-1": {"moe": True, "moe_k": 1},
    "moe-top-all": {"moe": True, "moe_k": 8},
    "moe-norm-min": {"moe": True, "moe_norm_min": 0.9},
}
PROMPT = torch.randint(3, 199, (45,), generator=torch.Generator().manual_seed(7)).tolist()
OTHER_PROMPT = torch.randint(3, 199, (29,), generator=torch.Generator().manual_seed(8)).tolist()
NEAR = list(range(256))
# Rotary embedding sees only distances: to be tested far out, a prompt must reach over them.
STRETCHED = [*range(20), *range(65_000, 65_015), *range(130_000, 130_256)]


def build(case: str) -> tuple[nn.Module, ErnieModel]:
    theirs = transformers_model(seed=11, **CASES[case])
    return theirs, tern_model(theirs)


def their_logits(model: nn.Module, tokens: list[int], positions: list[int]) -> Tensor:
    """[tokens, vocab] float32. The mask keeps transformers from reading a jump of positions as packed sequences."""
    ids, places = torch.tensor([tokens]), torch.tensor([positions[: len(tokens)]])
    with torch.no_grad():
        return model(input_ids=ids, position_ids=places, attention_mask=torch.ones_like(ids)).logits[0].float()


def assert_greedy(model: nn.Module, prompt: list[int], continuation: list[int], positions: list[int]) -> None:
    """Fail unless `continuation` is what transformers' model writes greedily after `prompt`.

    One pass shows it by induction: after every prefix of the continuation the likeliest token must be the next one. No
    choice may be so close that rounding could decide it.
    """
    logits = their_logits(model, prompt + continuation, positions)[len(prompt) - 1 : -1]
    best = logits.topk(2)
    margins = (best.values[:, 0] - best.values[:, 1]) / logits.abs().max()
    assert margins.min() > 5e-5, "this seed makes two tokens tie: choose another"
    assert continuation == best.indices[:, 0].tolist()


def our_greedy(
    model: ErnieModel, prompts: list[list[int]], positions: list[int], count: int, chunk: int
) -> list[list[int]]:
    """Greedy tokens of several prompts in one batch, prefilled in chunks of `chunk`, `chunk` + 3, ... tokens.

    The prompts advance at different speeds, so that prefill chunks and decodes share steps.
    """
    driver = Driver(model)
    sequences = [driver.sequence(len(prompt) + count, positions) for prompt in prompts]
    tokens = [list(prompt) for prompt in prompts]
    while True:
        step: list[tuple[PagedSequence, list[int]]] = []
        members = []
        for index, sequence in enumerate(sequences):
            if len(tokens[index]) < len(prompts[index]) + count:
                waiting = tokens[index][sequence.length :]
                step.append((sequence, waiting[: chunk + 3 * index]))
                members.append(index)
        if not step:
            return [tokens[index][len(prompt) :] for index, prompt in enumerate(prompts)]
        chosen = driver.last_logits(step).argmax(dim=-1).tolist()
        for index, token in zip(members, chosen, strict=True):
            if sequences[index].length == len(tokens[index]):
                tokens[index].append(token)


@pytest.mark.parametrize("case", CASES)
def test_float32_logits(case: str) -> None:
    theirs, ours = build(case)
    for positions in (NEAR, STRETCHED):
        driver = Driver(ours)
        hidden = driver.hidden([(driver.sequence(45, positions), PROMPT)])
        assert_close(ours.logits(hidden), their_logits(theirs, PROMPT, positions), tolerance=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_greedy_continuations_through_the_paged_cache(case: str) -> None:
    theirs, ours = build(case)
    prompts = [PROMPT, OTHER_PROMPT]
    written = our_greedy(ours, prompts, STRETCHED, 64, chunk=13)
    for prompt, continuation in zip(prompts, written, strict=True):
        assert len(continuation) == 64
        assert_greedy(theirs, prompt, continuation, STRETCHED)


@pytest.mark.parametrize("chunk", [1, 5, 45])
def test_greedy_equals_generate_whatever_the_chunk(chunk: int) -> None:
    theirs, ours = build("moe")
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        whole = theirs.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64, eos_token_id=None
        )
    assert our_greedy(ours, [PROMPT], NEAR, 64, chunk=chunk) == [whole[0, len(PROMPT) :].tolist()]


@pytest.mark.parametrize("case", ["dense", "dense-bias", "moe", "moe-bias", "moe-no-shared"])
def test_bf16_is_as_close_to_float32_as_transformers_is(case: str) -> None:
    exact, _ = build(case)
    theirs, _ = build(case)
    # Both run weights that bf16 holds, so that only the arithmetic differs; routers stay float32 as in a checkpoint.
    for module in (theirs, exact):
        for name, parameter in module.named_parameters():
            if "mlp.gate." not in name:
                parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    routers = {name: value.clone() for name, value in theirs.state_dict().items() if "mlp.gate." in name}
    theirs.to(torch.bfloat16)
    for name, parameter in theirs.named_parameters():
        if name in routers:
            parameter.data = routers[name]
    config = tern_model(exact).config
    ours = ErnieModel(config, canonical_tensors(config, theirs.state_dict()))
    assert ours.dtype == torch.bfloat16

    truth = their_logits(exact, PROMPT, NEAR)
    driver = Driver(ours)
    logits = ours.logits(driver.hidden([(driver.sequence(45), PROMPT)]))
    our_errors, their_errors = (row_errors(rows, truth) for rows in (logits, their_logits(theirs, PROMPT, NEAR)))
    # By the median: where two experts all but tie, either implementation may route a token differently than float32.
    assert our_errors.median() <= 1.2 * their_errors.median()
    assert our_errors.median() <= 0.02
    assert our_errors.max() <= 0.3


def row_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """The root-mean-square error of each row, as a share of the expected row's root mean square."""
    assert actual.isfinite().all()
    return (actual - expected).square().mean(dim=-1).sqrt() / expected.square().mean(dim=-1).sqrt()
