"""Random small networks in both implementations, and a driver that packs steps as an engine would. Knows no engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, Ernie4_5Config, Ernie4_5ForCausalLM

from tern.model import Batch, ErnieConfig, ErnieModel, KVCache

SMALL: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
SMALL_MOE: dict[str, Any] = {
    **SMALL,
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_intermediate_size": 32,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
}


def transformers_model(moe: bool, seed: int = 0, **changes: Any) -> nn.Module:
    """A small network of transformers' own class with random weights, biases and correction biases."""
    if moe:
        config = Ernie4_5_MoeConfig(**{**SMALL_MOE, **changes}, attn_implementation="eager")
        model: nn.Module = Ernie4_5_MoeForCausalLM(config)
    else:
        config = Ernie4_5Config(**{"head_dim": None, **SMALL, **changes}, attn_implementation="eager")
        model = Ernie4_5ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, noise))
    return model.eval()


def _scaled(name: str, noise: Tensor) -> Tensor:
    """Random weights that keep activations near 1 and let every part of the network matter."""
    if "e_score_correction_bias" in name:
        return 0.05 * noise
    if "norm" in name:
        return 1.0 + 0.2 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    if "gate.weight" in name:
        return 2.0 * noise / noise.shape[-1] ** 0.5
    return 1.2 * noise / noise.shape[-1] ** 0.5


def tern_model(model: nn.Module) -> ErnieModel:
    """The same network in Tern, read from transformers' config and weights as they are in memory."""
    config = ErnieConfig.from_dict(model.config.to_dict())
    return ErnieModel(config, canonical_tensors(config, model.state_dict()))


def canonical_tensors(config: ErnieConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names and layout to Tern's."""
    tensors = {"embed": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"]}
    if not config.tie_word_embeddings:
        tensors["head"] = state["lm_head.weight"]
    if "lm_head.bias" in state:
        tensors["head.bias"] = state["lm_head.bias"]
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{layer}.", f"layers.{layer}."
        tensors[ours + "attn_norm"] = state[theirs + "input_layernorm.weight"]
        tensors[ours + "mlp_norm"] = state[theirs + "post_attention_layernorm.weight"]
        attention = [f"{theirs}self_attn.{part}_proj" for part in "qkv"]
        tensors |= _fused(state, attention, ours + "attn.qkv")
        tensors |= _fused(state, [theirs + "self_attn.o_proj"], ours + "attn.o")
        if not config.is_moe_layer(layer):
            tensors |= _swiglu(state, theirs + "mlp.", ours + "mlp.")
            continue
        tensors[ours + "moe.router"] = state[theirs + "mlp.gate.weight"]
        tensors[ours + "moe.correction_bias"] = state[theirs + "mlp.gate.moe_statics.e_score_correction_bias"][0]
        tensors[ours + "moe.gate_up"] = state[theirs + "mlp.experts.gate_up_proj"]
        tensors[ours + "moe.down"] = state[theirs + "mlp.experts.down_proj"]
        if config.moe_num_shared_experts:
            tensors |= _swiglu(state, theirs + "mlp.shared_experts.", ours + "moe.shared.")
    return tensors


def _swiglu(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    gate_up = _fused(state, [theirs + "gate_proj", theirs + "up_proj"], ours + "gate_up")
    return gate_up | _fused(state, [theirs + "down_proj"], ours + "down")


def _fused(state: dict[str, Tensor], names: list[str], ours: str) -> dict[str, Tensor]:
    """Linears stacked along their outputs, with their biases if they have any."""
    kinds = [kind for kind in ("weight", "bias") if f"{names[0]}.{kind}" in state]
    return {f"{ours}.{kind}": torch.cat([state[f"{name}.{kind}"] for name in names]) for kind in kinds}


@dataclass
class PagedSequence:
    """One sequence's place in a paged cache: its scattered blocks, its length so far, its rotary positions.

    `positions` maps the n-th token to the position it is rotated by; the identity unless a test stretches it.
    """

    blocks: list[int]
    length: int = 0
    positions: list[int] = field(default_factory=lambda: list(range(4096)))


class Driver:
    """Runs steps of any mix of chunks through a model, over a cache whose unused slots are NaN."""

    def __init__(self, model: ErnieModel, *, num_blocks: int = 256, block_size: int = 8, num_layers: int | None = None):
        self.model = model
        self.kv = KVCache.allocate(
            model.config,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=model.dtype,
            device=model.device,
            num_layers=num_layers,
        )
        self.kv.keys.fill_(float("nan"))
        self.kv.values.fill_(float("nan"))
        self._free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()

    def sequence(self, max_tokens: int, positions: Iterable[int] | None = None) -> PagedSequence:
        """Scattered blocks for a sequence of at most `max_tokens` tokens."""
        count = -(-max_tokens // self.kv.block_size)
        blocks, self._free = self._free[:count], self._free[count:]
        assert len(blocks) == count, "the driver's cache is too small for this test"
        return PagedSequence(blocks) if positions is None else PagedSequence(blocks, positions=list(positions))

    def batch(self, chunks: list[tuple[PagedSequence, list[int]]]) -> Batch:
        """Pack one step and count its tokens as written."""
        token_ids, positions, slots, starts, contexts, rows = [], [], [], [0], [], []
        width = max(len(sequence.blocks) for sequence, _ in chunks)
        for sequence, tokens in chunks:
            new = range(sequence.length, sequence.length + len(tokens))
            size = self.kv.block_size
            token_ids += tokens
            positions += [sequence.positions[index] for index in new]
            slots += [sequence.blocks[index // size] * size + index % size for index in new]
            sequence.length += len(tokens)
            starts.append(len(token_ids))
            contexts.append(sequence.length)
            rows.append(len(token_ids) - 1)
        tables = [sequence.blocks + [0] * (width - len(sequence.blocks)) for sequence, _ in chunks]
        as_tensors = [torch.tensor(part, dtype=torch.int64) for part in (token_ids, positions, slots, starts, contexts)]
        longest = max(len(tokens) for _, tokens in chunks)
        return Batch(*as_tensors, torch.tensor(tables), torch.tensor(rows), longest, max(contexts))

    def hidden(self, chunks: list[tuple[PagedSequence, list[int]]]) -> Tensor:
        """One step -> hidden states of all its rows."""
        return self.model.hidden(self.batch(chunks), self.kv)

    def last_logits(self, chunks: list[tuple[PagedSequence, list[int]]]) -> Tensor:
        """One step -> logits of each chunk's last row, [chunks, vocab]."""
        batch = self.batch(chunks)
        return self.model.logits(self.model.hidden(batch, self.kv)[batch.logit_rows])
