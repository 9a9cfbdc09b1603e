"""The MTP block against a plain computation of its formula in float64, one token and one head at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tern.errors import CheckpointError
from tern.model import ErnieConfig, ErnieModel, KVCache, parameter_shapes
from tests.compare import assert_close
from tests.model.ernie_fixtures import SMALL, SMALL_MOE, Driver

Tensors = dict[str, Tensor]
TOKENS = torch.randint(0, 199, (40,), generator=torch.Generator().manual_seed(5)).tolist()


def build(**changes: Any) -> tuple[ErnieConfig, Tensors]:
    config = ErnieConfig.from_dict({**SMALL, "num_nextn_predict_layers": 1, **changes})
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) if len(shape) > 1
        else 1.0 + 0.2 * torch.randn(shape, generator=generator)
        for name, shape in parameter_shapes(config).items()
    }  # fmt: skip
    return config, tensors


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / math.sqrt(x.square().mean().item() + eps) * weight


def turn(head: Tensor, position: int, theta: float) -> Tensor:
    """Rotate the pairs (2j, 2j + 1) of one head's vector."""
    turned = head.clone()
    for j in range(len(head) // 2):
        angle = position * theta ** (-2 * j / len(head))
        a, b = head[2 * j], head[2 * j + 1]
        turned[2 * j] = a * math.cos(angle) - b * math.sin(angle)
        turned[2 * j + 1] = a * math.sin(angle) + b * math.cos(angle)
    return turned


def expected_logits(config: ErnieConfig, tensors: Tensors, tokens: list[int], hidden: Tensor) -> Tensor:
    """The formula of the paper for positions 0 .. len(tokens) - 2, from the decoder's `hidden` states."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        product = weights[name + ".weight"] @ x
        return product + weights[name + ".bias"] if name + ".bias" in weights else product

    eps, dim, group = config.rms_norm_eps, config.head_dim, config.num_attention_heads // config.num_key_value_heads
    keys: list[list[Tensor]] = []
    values: list[list[Tensor]] = []
    rows = []
    for position in range(len(tokens) - 1):
        embedded = weights["embed"][tokens[position + 1]] * (0.0 if position == 0 else 1.0)
        parts = [norm(embedded, weights["mtp.emb_norm"], eps)]
        parts.append(norm(hidden[position].double(), weights["mtp.hidden_norm"], eps))
        x = linear("mtp.proj", torch.cat(parts))
        heads = linear("mtp.block.attn.qkv", norm(x, weights["mtp.block.attn_norm"], eps)).split(dim)
        first_key = config.num_attention_heads
        first_value = first_key + config.num_key_value_heads
        keys.append([turn(head, position, config.rope_theta) for head in heads[first_key:first_value]])
        values.append(list(heads[first_value:]))
        attended = []
        for index in range(config.num_attention_heads):
            query, shared = turn(heads[index], position, config.rope_theta), index // group
            scores = torch.stack([query @ key[shared] for key in keys]) / math.sqrt(dim)
            shares = scores.softmax(dim=0)
            attended.append(sum((s * v[shared] for s, v in zip(shares, values, strict=True)), torch.zeros(dim)))
        x = x + linear("mtp.block.attn.o", torch.cat(attended))
        gate, up = linear("mtp.block.mlp.gate_up", norm(x, weights["mtp.block.mlp_norm"], eps)).chunk(2)
        x = x + linear("mtp.block.mlp.down", gate / (1 + torch.exp(-gate)) * up)
        rows.append(weights["embed"] @ x if config.tie_word_embeddings else weights["head"] @ x)
    return torch.stack(rows).float()


@pytest.mark.parametrize("changes", [{}, {"use_bias": True}, {"tie_word_embeddings": False}], ids=str)
@pytest.mark.parametrize(
    "raw", [{"model_type": "ernie4_5"}, {**SMALL_MOE, "model_type": "ernie4_5_moe"}], ids=["dense", "moe"]
)
def test_draft_logits_follow_the_formula_in_one_pass_and_in_chunks(
    raw: dict[str, Any], changes: dict[str, Any]
) -> None:
    config, tensors = build(**raw, **changes)
    if config.has_head_bias:
        tensors["head.bias"].zero_()
    model = ErnieModel(config, tensors)
    main = Driver(model)
    hidden = main.hidden([(main.sequence(40), TOKENS)])
    expected = expected_logits(config, tensors, TOKENS, hidden)
    assert model.mtp is not None
    for chunks in ([39], [1, 1, 20, 1, 16]):
        driver = Driver(model, num_layers=1)
        sequence, drafts, start = driver.sequence(39), [], 0
        for size in chunks:
            batch = driver.batch([(sequence, TOKENS[start + 1 : start + size + 1])])
            drafts.append(model.logits(model.mtp.hidden(batch, hidden[start : start + size], driver.kv)))
            start += size
        assert_close(torch.cat(drafts), expected, tolerance=1e-5)


def test_the_embedding_of_position_0_does_not_matter_and_that_of_others_does() -> None:
    config, tensors = build(model_type="ernie4_5")
    model = ErnieModel(config, tensors)
    assert model.mtp is not None
    previous = torch.randn(3, config.hidden_size, generator=torch.Generator().manual_seed(1))

    def drafts(tokens: list[int]) -> Tensor:
        driver = Driver(model, num_layers=1)
        return model.mtp.hidden(driver.batch([(driver.sequence(3), tokens)]), previous, driver.kv)  # type: ignore[union-attr]

    assert torch.equal(drafts([5, 6, 7]), drafts([9, 6, 7]))
    assert not torch.equal(drafts([5, 6, 7])[1:], drafts([5, 9, 7])[1:])


def test_a_checkpoint_without_mtp_makes_a_model_without_it() -> None:
    config, tensors = build(model_type="ernie4_5", use_bias=True)
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    assert ErnieModel(config, without).mtp is None
    del tensors["mtp.proj.bias"]
    model = ErnieModel(config, tensors)
    assert model.mtp is not None
    assert model.mtp.proj.bias is None


def test_half_an_mtp_block_is_an_error_that_names_the_missing_half() -> None:
    config, tensors = build(model_type="ernie4_5")
    del tensors["mtp.block.attn.o.weight"]
    tensors["mtp.emb_norm"] = torch.ones(3)
    with pytest.raises(CheckpointError) as caught:
        ErnieModel(config, tensors)
    assert caught.value.problems == (
        "mtp.emb_norm has shape [3] instead of [64]",
        "mtp.block.attn.o.weight [64, 64] is missing",
    )


def test_caches_are_sized_by_layers() -> None:
    config, _ = build(model_type="ernie4_5")
    sizes = {"num_blocks": 2, "block_size": 4, "dtype": torch.float32, "device": torch.device("cpu")}
    assert KVCache.allocate(config, **sizes).keys.shape == (3, 2, 2, 16, 4, 1)
    assert KVCache.allocate(config, **sizes, num_layers=1).values.shape == (1, 2, 2, 4, 16, 1)
