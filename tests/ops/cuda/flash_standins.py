"""FlashAttention-3 and FlashInfer as they are called, computed in plain torch over the views that they are given.

The signatures are those of flash_attn_3 3.0.0 (`hopper/flash_attn_interface.py`) and flashinfer-python 0.7.2, and what
is demanded of arguments is what their C++ and Python demand. What Tern never passes is not computed but refused.
"""

# ruff: noqa: ARG002 -- whole signatures, of which little is used
from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The last positions [rows, N, D] of a context [positions, G, D], each of which sees what is not behind it."""
    rows, heads, _ = queries.shape
    wide = [x.float().repeat_interleave(heads // x.shape[1], dim=1) for x in (keys, values)]
    scores = torch.einsum("rnd,cnd->nrc", queries.float(), wide[0]) * scale
    hidden = torch.ones(rows, len(keys), dtype=torch.bool).triu(len(keys) - rows + 1)
    weights = scores.masked_fill(hidden.to(scores.device), -torch.inf).softmax(-1)
    return torch.einsum("nrc,cnd->rnd", weights, wide[1]).to(queries.dtype)


def gather(cache: Tensor, blocks: Tensor, count: int) -> Tensor:
    """The first `count` positions in these blocks of a view [blocks, block_size, G, D]."""
    return cache[blocks.long()].flatten(0, 1)[:count]


def check_view(cache: Tensor) -> None:
    """What both demand of a cache: numbers of a head side by side, 16 bytes at once."""
    assert cache.dim() == 4
    assert cache.stride(3) == 1
    assert all(stride * cache.element_size() % 16 == 0 for stride in cache.stride()[:3])


class FlashAttentionStandIn:
    """The module `flash_attn_interface`. `views` are the caches of the calls so far."""

    def __init__(self) -> None:
        self.views: list[tuple[Tensor, Tensor]] = []
        self.module = ModuleType("flash_attn_interface")
        self.module.flash_attn_with_kvcache = self._function()  # type: ignore[attr-defined]

    def _function(self) -> object:
        def flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k=None,
            v=None,
            qv=None,
            rotary_cos=None,
            rotary_sin=None,
            cache_seqlens=None,
            cache_batch_idx=None,
            cache_leftpad=None,
            page_table=None,
            cu_seqlens_q=None,
            cu_seqlens_k_new=None,
            max_seqlen_q=None,
            rotary_seqlens=None,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            softmax_scale=None,
            causal=False,
            window_size=(-1, -1),
            attention_chunk=0,
            softcap=0.0,
            rotary_interleaved=True,
            scheduler_metadata=None,
            num_splits=0,
            pack_gqa=None,
            sm_margin=0,
            return_softmax_lse=False,
        ) -> Tensor:
            unused = (k, v, qv, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, cu_seqlens_k_new)
            unused += (rotary_seqlens, q_descale, k_descale, v_descale, scheduler_metadata, pack_gqa)
            assert all(each is None for each in unused)
            assert (window_size, attention_chunk, softcap, sm_margin) == ((-1, -1), 0, 0.0, 0)
            assert causal
            assert rotary_interleaved
            assert not return_softmax_lse
            assert num_splits == 1
            numbers = (cache_seqlens, page_table, cu_seqlens_q)
            assert all(each.dtype == torch.int32 and each.device == q.device for each in numbers)
            assert all(each.stride(-1) == 1 for each in (q, *numbers))
            assert q.dtype == k_cache.dtype == v_cache.dtype
            assert q.dtype in (torch.bfloat16, torch.float16)
            sequences = len(cu_seqlens_q) - 1
            assert (len(cache_seqlens), len(page_table)) == (sequences, sequences)
            check_view(k_cache)
            check_view(v_cache)
            self.views.append((k_cache, v_cache))
            lengths, starts = cu_seqlens_q.diff().tolist(), cu_seqlens_q.tolist()
            assert max(lengths) == max_seqlen_q
            assert starts[-1] == len(q)
            out = torch.empty_like(q)
            for row, context in enumerate(cache_seqlens.tolist()):
                blocks = page_table[row, : -(-context // k_cache.shape[1])]
                mine = slice(starts[row], starts[row + 1])
                found = (gather(cache, blocks, context) for cache in (k_cache, v_cache))
                out[mine] = attend(q[mine], *found, softmax_scale)
            return out

        return flash_attn_with_kvcache


class FlashInferStandIn:
    """The module `flashinfer`. `plans` counts the steps that were planned, `views` are the caches of the runs."""

    def __init__(self) -> None:
        self.views: list[tuple[Tensor, Tensor]] = []
        self.plans = 0
        self.module = ModuleType("flashinfer")
        self.module.BatchPrefillWithPagedKVCacheWrapper = self._wrapper()  # type: ignore[attr-defined]

    def _wrapper(outer) -> type:
        class BatchPrefillWithPagedKVCacheWrapper:
            def __init__(
                self,
                float_workspace_buffer,
                kv_layout="NHD",
                use_cuda_graph=False,
                qo_indptr_buf=None,
                paged_kv_indptr_buf=None,
                paged_kv_indices_buf=None,
                paged_kv_last_page_len_buf=None,
                custom_mask_buf=None,
                mask_indptr_buf=None,
                backend="auto",
                jit_args=None,
                jit_kwargs=None,
                variant_owns_mask=False,
            ) -> None:
                assert float_workspace_buffer.dtype == torch.uint8
                assert (kv_layout, use_cuda_graph, backend, jit_args, jit_kwargs) == ("NHD", False, "auto", None, None)

            def plan(
                self,
                qo_indptr,
                paged_kv_indptr,
                paged_kv_indices,
                paged_kv_last_page_len,
                num_qo_heads,
                num_kv_heads,
                head_dim_qk,
                page_size,
                head_dim_vo=None,
                custom_mask=None,
                packed_custom_mask=None,
                causal=False,
                pos_encoding_mode="NONE",
                use_fp16_qk_reduction=False,
                sm_scale=None,
                window_left=-1,
                logits_soft_cap=None,
                rope_scale=None,
                rope_theta=None,
                q_data_type="float16",
                kv_data_type=None,
                o_data_type=None,
                non_blocking=True,
                prefix_len_ptr=None,
                token_pos_in_items_ptr=None,
                token_pos_in_items_len=0,
                max_item_len_ptr=None,
                seq_lens=None,
                seq_lens_q=None,
                block_tables=None,
                max_token_per_sequence=None,
                max_sequence_kv=None,
                fixed_split_size=None,
                disable_split_kv=False,
                uniform_q_len=None,
            ) -> None:
                on_host = (qo_indptr, paged_kv_indptr, paged_kv_last_page_len)
                assert all(each.dtype == torch.int32 and each.device.type == "cpu" for each in on_host)
                assert paged_kv_indices.dtype == torch.int32
                assert len(paged_kv_indices) == paged_kv_indptr[-1]
                assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
                assert causal
                assert disable_split_kv
                assert (pos_encoding_mode, window_left) == ("NONE", -1)
                outer.plans += 1
                pages = paged_kv_indptr.diff()
                self.contexts = (page_size * (pages - 1).clamp(min=0) + paged_kv_last_page_len).tolist()
                self.blocks = paged_kv_indices.split(pages.tolist())
                self.starts = qo_indptr.tolist()
                self.sizes = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
                self.types = (q_data_type, kv_data_type)
                self.scale = sm_scale

            def run(
                self,
                q,
                paged_kv_cache,
                *args,
                q_scale=None,
                k_scale=None,
                v_scale=None,
                out=None,
                lse=None,
                return_lse=False,
                lse_base="log2",
                lse_layout="NH",
                enable_pdl=None,
                window_left=None,
                sinks=None,
                kv_cache_sf=None,
                skip_softmax_threshold_scale_factor=None,
                use_fp16_softmax=None,
                uses_spcompress=None,
            ) -> Tensor:
                keys, values = paged_kv_cache
                assert not args
                assert q.shape == (self.starts[-1], self.sizes[0], self.sizes[2])
                assert keys.shape[1:] == values.shape[1:] == (self.sizes[3], self.sizes[1], self.sizes[2])
                assert (q.dtype, keys.dtype) == self.types
                assert values.dtype == keys.dtype
                assert keys.stride() == values.stride()
                assert (out.shape, out.dtype) == (q.shape, q.dtype)
                check_view(keys)
                check_view(values)
                outer.views.append((keys, values))
                for row, (context, blocks) in enumerate(zip(self.contexts, self.blocks, strict=True)):
                    mine = slice(self.starts[row], self.starts[row + 1])
                    found = (gather(cache, blocks, context) for cache in (keys, values))
                    out[mine] = attend(q[mine], *found, self.scale)
                return out

        return BatchPrefillWithPagedKVCacheWrapper
