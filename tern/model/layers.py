"""The parts of a decoder layer: attention, SwiGLU, experts. Knows the arithmetic's names; knows no layer numbers.

A part holds views of its parameters and is called with the rows of one step, `[tokens, hidden_size]`. Its `form` is
that in which its weights take them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tern import ops
from tern.errors import CheckpointError
from tern.model.batch import Batch, KVCache
from tern.model.config import ErnieConfig


@dataclass(frozen=True)
class Step:
    """What every layer of one forward pass shares: where tokens stand, where they are written, what they may see.

    `cosines`, `signed_sines` [tokens, head_dim] float32; `slots` [tokens].
    """

    cosines: Tensor
    signed_sines: Tensor
    slots: Tensor
    plan: ops.AttentionPlan

    @classmethod
    def of(cls, batch: Batch, frequencies: Tensor, kv: KVCache) -> Step:
        """Prepare `batch` for the cache."""
        cosines, signed_sines = ops.rotary_table(batch.positions, frequencies)
        plan = ops.plan_attention(
            batch.query_starts,
            batch.context_lens,
            batch.block_tables,
            kv.values,
            max_query_len=batch.max_query_len,
            max_context_len=batch.max_context_len,
            chunks=batch.chunks,
        )
        return cls(cosines, signed_sines, batch.slots, plan)


class Parameters:
    """The parameters below a prefix, by the rest of their canonical names."""

    def __init__(self, tensors: Mapping[str, ops.Weight], prefix: str = "") -> None:
        self._tensors = tensors
        self._prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
        found = self.get(name)
        if found is None:
            raise KeyError(self._prefix + name)
        return found

    def get(self, name: str) -> Tensor | None:
        """The parameter, or None where the network has none of this name; a rounded one is refused."""
        found = self._tensors.get(self._prefix + name)
        if found is not None and not isinstance(found, Tensor):
            raise CheckpointError(f"{self._prefix}{name} is kept as {found.quantization}: only linear weights may be.")
        return found

    def weight(self, name: str) -> ops.Weight:
        """A linear weight, or a stack of them, in any form."""
        return self._tensors[self._prefix + name]

    def under(self, prefix: str) -> Parameters:
        """The parameters below `prefix`."""
        return Parameters(self._tensors, self._prefix + prefix)


class Linear:
    """A matrix and perhaps a bias: `[tokens, in]` -> `[tokens, out]`."""

    def __init__(self, parameters: Parameters) -> None:
        self.weight = parameters.weight("weight")
        self.bias = parameters.get("bias")
        self.form = ops.row_form(self.weight)

    def __call__(self, x: ops.Rows) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


def swiglu_weights(parameters: Parameters) -> ops.SwiGLUWeights:
    """The weights and biases of the SwiGLU under these parameters."""
    gate_up, down = parameters.under("gate_up."), parameters.under("down.")
    return ops.SwiGLUWeights(gate_up.weight("weight"), down.weight("weight"), gate_up.get("bias"), down.get("bias"))


class SwiGLU:
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, parameters: Parameters) -> None:
        self.weights = swiglu_weights(parameters)
        self.form = ops.row_form(self.weights.gate_up)

    def __call__(self, x: ops.Rows) -> Tensor:
        return ops.swiglu(x, self.weights)


class Experts:
    """Mixture of experts: each token's top experts, weighted by the router, and the shared experts unweighted."""

    def __init__(self, config: ErnieConfig, parameters: Parameters) -> None:
        self.router = ops.Router(parameters["router"], parameters["correction_bias"], config.moe_k, config.moe_norm_min)
        self.gate_up = parameters.weight("gate_up")
        self.down = parameters.weight("down")
        self.shared = swiglu_weights(parameters.under("shared.")) if config.moe_num_shared_experts > 0 else None
        beside = () if self.shared is None else (self.shared.gate_up,)
        self.form = ops.row_form(self.router.weight, self.gate_up, *beside)

    def __call__(self, x: ops.Rows) -> ops.Delta:
        return ops.mixture(x, self.router, self.gate_up, self.down, self.shared)


class Attention:
    """Grouped-query attention with interleaved rotary embedding over the paged cache."""

    def __init__(self, parameters: Parameters) -> None:
        self.qkv = Linear(parameters.under("qkv."))
        self.o = Linear(parameters.under("o."))
        self.form = self.qkv.form

    def __call__(self, x: ops.Rows, step: Step, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        tables = (step.cosines, step.signed_sines)
        return self.o(ops.attend(self.qkv(x), *tables, step.slots, key_cache, value_cache, step.plan, self.o.form))


class DecoderLayer:
    """One pre-norm layer: x += attention(norm(x)); x += mlp(norm(x)), where mlp is a SwiGLU or a mixture of experts."""

    def __init__(self, config: ErnieConfig, parameters: Parameters, *, moe: bool) -> None:
        self.eps = config.rms_norm_eps
        self.attn_norm = parameters["attn_norm"]
        self.mlp_norm = parameters["mlp_norm"]
        self.attention = Attention(parameters.under("attn."))
        self.mlp = Experts(config, parameters.under("moe.")) if moe else SwiGLU(parameters.under("mlp."))

    def __call__(
        self, delta: ops.Delta | None, residual: Tensor, step: Step, key_cache: Tensor, value_cache: Tensor
    ) -> tuple[ops.Delta, Tensor]:
        """`delta` is what the layer before has still to add to the `residual` stream, and what this one returns first.

        Adding it belongs to the next norm, which so reads and writes the stream once.
        """
        x, residual = ops.add_rms_norm(delta, residual, self.attn_norm, self.eps, self.attention.form)
        delta = self.attention(x, step, key_cache, value_cache)
        x, residual = ops.add_rms_norm(delta, residual, self.mlp_norm, self.eps, self.mlp.form)
        return self.mlp(x), residual
