"""Attention over a paged KV cache on a GPU. Knows block tables and positions; knows no layers and no requests.

A row's context is cut at multiples of `PIECE` positions. Within a piece keys are visited in tiles of `TILE` with the
running softmax of flash attention (arXiv 2205.14135); what the pieces of a stretch came to is joined from the first to
the last, and so is what the stretches came to. These cuts depend on positions alone, so there are two ways to the same
sums:

    few queries a sequence (decodes, drafts)          a chunk of many
    program     piece 0   1   2   3   4               program            piece 0   1   2   3   4
    p                 #           #                   rows  0..11              #   #   #
    p + 1                 #           #               rows 12..23              #   #   #   #
    p + 2                     #                       rows 24..35              #   #   #   #   #
    each writes its pieces' sums, and who             each joins a piece when it has it,
    comes last joins them, 0 to 4                     0 to 4

A row comes out bit by bit alike on both, whatever stands beside it. What lies beyond a row's own position changes
nothing in it: a weight of zero, a factor of one.
docs/decisions/0019-attention-by-one-instruction.md says what this asks of the hardware.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tern.ops.attention_libraries import Chunks
from tern.ops.cuda.attention_chunks import attend_chunks
from tern.ops.cuda.attention_few import NewTokens, attend_few
from tern.ops.cuda.attention_parts import LEAST_ROWS, MAX_ROWS, multiplied
from tern.ops.cuda.fp8 import round_rows_to_fp8
from tern.ops.cuda.launch import triton
from tern.ops.cuda.rotary import check_rows, rotate_and_store
from tern.ops.cuda.rounding import empty_fp8_rows
from tern.ops.gpu_weights import BLOCK, RowForm, Rows


@dataclass(frozen=True)
class GpuPlan:
    """One step's queries: tensors on the device as they came, whose numbers the host never reads.

    The launches depend on the shapes and the two lengths alone. A CUDA graph that was captured with them is right for
    any numbers in the tensors, as long as no chunk and no context is longer than the plan says.
    """

    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_query_len: int
    max_context_len: int
    chunks: Chunks | None = None
    """Of prompts, where a library attends them; None where the kernels here do."""


def attend(
    qkv: Tensor,
    cosines: Tensor,
    signed_sines: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: GpuPlan,
    form: RowForm = "plain",
) -> Rows:
    """As `tern.ops.attend`: one launch while no sequence has more than a few queries."""
    check_rows(qkv, cosines, signed_sines, slots, key_cache, value_cache)
    kv_heads, head_dim = key_cache.shape[0], key_cache.shape[4]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    few, _ = _few(qkv.dtype, heads // kv_heads, key_cache, plan)
    caches = (key_cache, value_cache)
    if plan.max_query_len > few:
        queries = rotate_and_store(qkv, cosines, signed_sines, slots, *caches)
        return _in_form(paged_attention(queries, *caches, plan).flatten(1), form)
    tokens = NewTokens(cosines.contiguous(), signed_sines.contiguous(), slots.contiguous())
    if form == "fp8" and head_dim == BLOCK:
        rounded = empty_fp8_rows(qkv.shape[0], heads * head_dim, qkv.dtype, qkv.device, None)
        attend_few(qkv.contiguous(), heads, tokens, caches, plan, few, rounded.values, rounded.scales)
        return rounded
    output = qkv.new_empty(qkv.shape[0], heads, head_dim)
    attend_few(qkv.contiguous(), heads, tokens, caches, plan, few, output)
    return _in_form(output.flatten(1), form)


def _in_form(rows: Tensor, form: RowForm) -> Rows:
    return rows if form == "plain" else round_rows_to_fp8(rows)


def paged_attention(queries: Tensor, key_cache: Tensor, value_cache: Tensor, plan: GpuPlan) -> Tensor:
    """As `tern.ops.reference_attention.paged_attention`; a row of no sequence stays unwritten.

    The caches are one layer's as a GPU keeps them (`tern.ops.kv_cache_shapes`), of any floating type. Queries and keys
    are multiplied in the wider of their types, beside float8 keys in float16 if the queries have 16 bits. While few
    queries meet a context their pieces' sums take 4.25 * (D + 2) bytes for each query head of a row and each piece of
    the plan's longest context, 0.7 MB a row of 20 heads of 128 at 8 192 positions and 11 MB at 131 072. Where so many
    sequences decode that each has one program, sums of a stretch and of the stretches are all, 0.2 and 0.8 MB.
    """
    queries = queries.contiguous()
    _check(queries, key_cache, value_cache)
    output = torch.empty_like(queries)
    group = queries.shape[1] // key_cache.shape[0]
    sequences = plan.context_lens.shape[0]
    if queries.numel() == 0 or sequences == 0:
        return output
    few, rows = _few(queries.dtype, group, key_cache, plan)
    caches = (key_cache, value_cache)
    if plan.max_query_len > few and plan.chunks is not None:
        plan.chunks.attend(queries, caches, plan.block_tables, output)
        few = plan.chunks.longest_within(rows // group)  # which are attended here, whatever the library made of them
    elif plan.max_query_len > few:
        attend_chunks(queries, caches, plan, few, rows, output)
    if plan.max_query_len <= few or sequences > 1:
        attend_few(queries, queries.shape[1], None, caches, plan, few, output)
    return output


def _few(queries: torch.dtype, group: int, key_cache: Tensor, plan: GpuPlan) -> tuple[int, int]:
    """How many queries of a sequence are few in this step, and the rows of a program."""
    wide = multiplied(queries, key_cache.dtype) == torch.float32
    rows = max(LEAST_ROWS if wide else MAX_ROWS, triton.next_power_of_2(group))
    return (plan.max_query_len if plan.max_query_len * group <= rows else 1), rows


def _check(queries: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """Raise `ValueError` for caches that the kernels would read wrongly."""
    kv_heads, num_blocks, _, block_size, head_dim = key_cache.shape
    if tuple(value_cache.shape) != (kv_heads, num_blocks, block_size, head_dim, 1) or key_cache.shape[2] != 1:
        raise ValueError(
            f"caches of shapes {list(key_cache.shape)} and {list(value_cache.shape)} are not laid out for a GPU: "
            "allocate them by kv_cache_shapes(..., gpu=True)"
        )
    if not (key_cache[0].is_contiguous() and value_cache[0].is_contiguous()):
        raise ValueError("the blocks of a KV head must lie one behind the other: pass a layer's cache as it was made")
    if queries.shape[2] != head_dim or queries.shape[1] % kv_heads:
        raise ValueError(
            f"{queries.shape[1]} query heads of {queries.shape[2]} do not fit a cache of {kv_heads} heads of {head_dim}"
        )
