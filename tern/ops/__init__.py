"""The arithmetic of the network, by function: the one door by which the model calls it.

On the CPU the kernels in `tern.ops.cpu` compute what they can: products with packed weights of 4 and 8 bits, attention,
norms and routing in float32 and bfloat16, attention over int8 caches. Everything else, and every product with plain
weights, is the reference in plain torch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tern.errors import OptionError
from tern.ops import (
    cpu,
    reference,
    reference_attention,
    reference_gpu,
    reference_packed,
    reference_sampling,
    split_experts,
)
from tern.ops.attention_libraries import (
    AttentionLibrary,
    AttentionWork,
    Chunks,
    check_attention_backend,
    choose_attention,
    installed_attention,
)
from tern.ops.delta import Delta, ExpertOutputs
from tern.ops.gpu_weights import (
    Fp8Rows,
    Fp8Weight,
    GpuWeight,
    RowForm,
    RowPackedWeight,
    Rows,
    Weight,
    plain_rows,
    round_to_fp8,
    row_form,
)
from tern.ops.packed import PackedWeight, empty, packed_shapes, unpack
from tern.ops.placement import on_gpu, uses_gpu
from tern.ops.reference import (
    cached_head_dim,
    embed,
    kv_cache_shapes,
    rotary_frequencies,
    write_kv,
)
from tern.ops.reference_sampling import Draws, likeliest
from tern.ops.router import Router
from tern.ops.swiglu import SwiGLUWeights

__all__ = [
    "AttentionLibrary",
    "AttentionPlan",
    "AttentionWork",
    "Chunks",
    "Delta",
    "Draws",
    "ExpertOutputs",
    "Fp8Rows",
    "Fp8Weight",
    "GpuWeight",
    "PackedWeight",
    "Router",
    "RowForm",
    "RowPackedWeight",
    "Rows",
    "SwiGLUWeights",
    "Weight",
    "add_rms_norm",
    "attend",
    "cached_head_dim",
    "check_attention_backend",
    "choose_attention",
    "draw",
    "embed",
    "empty",
    "installed_attention",
    "keep_allowed",
    "kv_cache_shapes",
    "largest",
    "likeliest",
    "linear",
    "mix_experts",
    "mixture",
    "pack",
    "packed_shapes",
    "paged_attention",
    "plan_attention",
    "prepare",
    "rms_norm",
    "rotary_frequencies",
    "rotary_table",
    "rotate_and_store",
    "round_to_fp8",
    "route",
    "row_form",
    "swiglu",
    "unpack",
    "uses_gpu",
    "write_kv",
]

if TYPE_CHECKING:
    from tern.ops.cuda import GpuPlan

AttentionPlan: TypeAlias = "cpu.SequencesPlan | reference_attention.AttentionPlan | GpuPlan"
"""How one step's queries meet the cache; the same for every layer, so it is made once a step."""


def prepare(device: torch.device) -> None:
    """Start what computes on `device`, so that a wish that the machine cannot grant is known before any work.

    Raises `OptionError` if there is no such device, or if the environment asks for an instruction set or a number of
    threads that there is not.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device is {device} but no NVIDIA GPU can be used here: choose cpu.")
    if device.type == "cpu":
        cpu.machine()


def pack(weight: Tensor, bits: int, parts: int = 1) -> PackedWeight:
    """Round `weight` [out, in], or a stack [experts, out, in], to 4 or 8 bits; see `tern.ops.reference_packed.pack`."""
    if cpu.can_norm(weight.flatten(0, -2)):
        return cpu.pack(weight, bits, parts)
    return reference_packed.pack(weight, bits, parts)


def linear(x: Rows, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """`x` [T, in], `weight` [out, in], `bias` [out] -> [T, out]."""
    if isinstance(weight, PackedWeight):
        return cpu.linear_packed(plain_rows(x), weight, bias)
    if on_gpu(x):
        from tern.ops import cuda

        return cuda.linear(x, weight, bias)
    return reference_gpu.linear(plain_rows(x), weight, bias)


def swiglu(x: Rows, layer: SwiGLUWeights) -> Tensor:
    """down(silu(gate(x)) * up(x)): `x` [T, in] -> [T, out]. Both weights are packed or neither."""
    if isinstance(layer.gate_up, PackedWeight):
        return cpu.swiglu_packed(plain_rows(x), layer)
    if on_gpu(x):
        from tern.ops import cuda

        return cuda.swiglu(x, layer)
    x = plain_rows(x)
    if isinstance(layer.gate_up, Tensor) and isinstance(layer.down, Tensor):
        return reference.swiglu(x, layer, _gated(x))
    return reference_gpu.swiglu(x, layer)


def _gated(x: Tensor) -> reference.Gated:
    # torch rounds an element at the end of a thread's share otherwise than one in the middle.
    return cpu.silu_mul if cpu.can_norm(x) else reference.silu_mul


@overload
def add_rms_norm(
    delta: Delta | None, residual: Tensor, weight: Tensor, eps: float, form: Literal["plain"] = "plain"
) -> tuple[Tensor, Tensor]: ...
@overload
def add_rms_norm(
    delta: Delta | None, residual: Tensor, weight: Tensor, eps: float, form: RowForm
) -> tuple[Rows, Tensor]: ...
def add_rms_norm(
    delta: Delta | None, residual: Tensor, weight: Tensor, eps: float, form: RowForm = "plain"
) -> tuple[Rows, Tensor]:
    """Add `delta` [T, H] (None: nothing) to the residual stream [T, H] and norm the sum -> (normed, new residual).

    The normed rows come in `form` on a GPU, and as a tensor elsewhere: there each product rounds its own.
    """
    if on_gpu(residual):
        from tern.ops import cuda

        return cuda.add_rms_norm(delta, residual, weight, eps, form)
    if isinstance(delta, ExpertOutputs):
        delta = delta.sum()
    if cpu.can_norm(residual):
        return cpu.add_rms_norm(delta, residual, weight, eps)
    return reference.add_rms_norm(delta, residual, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The rows `x` [T, H] normed, as `tern.ops.reference.rms_norm`."""
    return add_rms_norm(None, x, weight, eps)[0]


def route(
    x: Rows, router: Tensor, correction_bias: Tensor, experts_per_token: int, norm_min: float
) -> tuple[Tensor, Tensor]:
    """The experts of each token -> (weights [T, K] float32, experts [T, K] int64); see `tern.ops.reference.route`."""
    x = plain_rows(x)
    if on_gpu(x):
        from tern.ops import cuda

        return cuda.route(x, router, correction_bias, experts_per_token, norm_min)
    if cpu.can_norm(x):
        return cpu.route(x, router, correction_bias, experts_per_token, norm_min)
    return reference.route(x, router, correction_bias, experts_per_token, norm_min)


def mix_experts(
    x: Rows, weights: Tensor, experts: Tensor, gate_up: Weight, down: Weight, shared: SwiGLUWeights | None = None
) -> Delta:
    """The weighted sum of each token's experts, plus the shared one -> [T, H]; see `tern.ops.reference.mix_experts`."""
    if isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight):
        if split_experts.are_apart(x, shared):
            return split_experts.mix_experts(x, weights, experts, gate_up, down, shared, swiglu)
        return cpu.mix_experts_packed(plain_rows(x), weights, experts, gate_up, down, shared)
    if isinstance(gate_up, PackedWeight) or isinstance(down, PackedWeight):
        raise TypeError("the experts' weights are packed as a whole or not at all")
    if on_gpu(x):
        from tern.ops import cuda

        return cuda.mix_experts(x, weights, experts, gate_up, down, shared)
    x = plain_rows(x)
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        return reference.mix_experts(x, weights, experts, gate_up, down, shared, _gated(x))
    return reference_gpu.mix_experts(x, weights, experts, gate_up, down, shared)


def mixture(x: Rows, router: Router, gate_up: Weight, down: Weight, shared: SwiGLUWeights | None = None) -> Delta:
    """`mix_experts` of what `route` gives for `x` [T, H] -> [T, H]; a GPU computes them in fewer launches."""
    if on_gpu(x) and isinstance(gate_up, GpuWeight) and isinstance(down, GpuWeight):
        from tern.ops import cuda

        return cuda.mixture(x, router, gate_up, down, shared)
    chosen = route(x, router.weight, router.correction_bias, router.experts_per_token, router.norm_min)
    return mix_experts(x, *chosen, gate_up, down, shared)


def rotary_table(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for `positions` [T] -> two [T, D] float32; see `tern.ops.reference.rotary_table`."""
    if on_gpu(positions):
        from tern.ops import cuda

        return cuda.rotary_table(positions, frequencies)
    return reference.rotary_table(positions, frequencies)


def rotate_and_store(
    qkv: Tensor, cosines: Tensor, signed_sines: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor
) -> Tensor:
    """Turn queries and keys, store keys and values -> queries; see `tern.ops.reference.rotate_and_store`."""
    if on_gpu(qkv):
        from tern.ops import cuda

        return cuda.rotate_and_store(qkv, cosines, signed_sines, slots, key_cache, value_cache)
    if cpu.can_attend(value_cache) and cpu.can_norm(qkv):
        return cpu.rotate_and_store(qkv, cosines, signed_sines, slots, key_cache, value_cache)
    return reference.rotate_and_store(qkv, cosines, signed_sines, slots, key_cache, value_cache)


def plan_attention(
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    values: Tensor,
    *,
    max_query_len: int,
    max_context_len: int,
    chunks: Chunks | None = None,
) -> AttentionPlan:
    """Prepare a step's queries for caches whose values are like `values` [..., block_size / r, W, r].

    Sequence s owns the query rows `query_starts[s] : query_starts[s + 1]`, the last positions of a context of
    `context_lens[s]` tokens whose slots lie in the blocks `block_tables[s]`. Shapes [S + 1], [S], [S, max_blocks].
    No chunk is longer than `max_query_len` and no context than `max_context_len`: a GPU's launches are sized by them,
    for the host reads no tensor there. `chunks` are those that a library attends on a GPU.
    """
    if on_gpu(values):
        from tern.ops import cuda

        return cuda.GpuPlan(query_starts, context_lens, block_tables, max_query_len, max_context_len, chunks)
    if cpu.can_attend(values):
        return cpu.SequencesPlan(query_starts, context_lens, block_tables)
    return reference_attention.plan_attention(
        query_starts, context_lens, block_tables, values.shape[-3] * values.shape[-1]
    )


def paged_attention(queries: Tensor, key_cache: Tensor, value_cache: Tensor, plan: AttentionPlan) -> Tensor:
    """Causal attention of a step's queries; see `tern.ops.reference_attention.paged_attention`."""
    if isinstance(plan, cpu.SequencesPlan):
        return cpu.paged_attention(queries, key_cache, value_cache, plan)
    if isinstance(plan, reference_attention.AttentionPlan):
        return reference_attention.paged_attention(queries, key_cache, value_cache, plan)
    from tern.ops import cuda

    return cuda.paged_attention(queries, key_cache, value_cache, plan)


def attend(
    qkv: Tensor,
    cosines: Tensor,
    signed_sines: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: AttentionPlan,
    form: RowForm = "plain",
) -> Rows:
    """`rotate_and_store`, and `paged_attention` of the queries -> [T, N * D].

    The rows come in `form` on a GPU, and as a tensor elsewhere. A GPU does it all in one launch while every sequence
    has few queries. There, rows of no sequence are neither stored nor written.
    """
    if not isinstance(plan, cpu.SequencesPlan | reference_attention.AttentionPlan):
        from tern.ops import cuda

        return cuda.attend(qkv, cosines, signed_sines, slots, key_cache, value_cache, plan, form)
    queries = rotate_and_store(qkv, cosines, signed_sines, slots, key_cache, value_cache)
    return paged_attention(queries, key_cache, value_cache, plan).flatten(1)


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of logits and its place; see `tern.ops.reference_sampling.largest`."""
    if on_gpu(logits):
        from tern.ops import cuda

        return cuda.largest(logits)
    if cpu.can_choose(logits):
        return cpu.largest(logits)
    return reference_sampling.largest(logits)


def keep_allowed(logits: Tensor, rows: Sequence[int], masks: npt.NDArray[np.uint32]) -> None:
    """Forbid tokens of some rows of logits, in place; see `tern.ops.reference_sampling.keep_allowed`."""
    if on_gpu(logits):
        from tern.ops import cuda

        cuda.keep_allowed(logits, rows, masks)
    elif cpu.can_choose(logits):
        cpu.keep_allowed(logits, rows, masks)
    else:
        reference_sampling.keep_allowed(logits, rows, masks)


def draw(logits: Tensor, peaks: Tensor, draws: Draws) -> Tensor:
    """Draw a token id for every row of logits, which are overwritten; see `tern.ops.reference_sampling.draw`."""
    if on_gpu(logits):
        from tern.ops import cuda

        return cuda.draw(logits, peaks, draws)
    if cpu.can_choose(logits):
        return cpu.draw(logits, peaks, draws)
    return reference_sampling.draw(logits, peaks, draws)
