"""The ERNIE-4.5-MoE network in the form that trains fast on a few CPU cores.

Knows tensors and transformers' configuration class; knows nothing of text or data. The arithmetic is that of
``transformers.Ernie4_5_MoeForCausalLM`` (a test compares the logits of a saved checkpoint); what differs is the
work's order: tokens are sorted by expert once, each expert multiplies one contiguous slice, and the permutation's
backward pass is a gather instead of a scatter.

Shapes: ``B`` sequences, ``L`` positions, ``N = B * L`` tokens, ``H`` hidden size, ``E`` experts, ``K`` experts per
token, ``I`` width of one expert.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Ernie4_5_MoeConfig

ROWS = 64
"""Granularity of an expert's share of the rows."""


def tiny_config(vocab_size: int, eos_token_ids: list[int]) -> Ernie4_5_MoeConfig:
    """The embedded model's shape."""
    return Ernie4_5_MoeConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        moe_num_experts=16,
        moe_k=4,
        moe_num_shared_experts=2,
        moe_intermediate_size=64,
        moe_layer_start_index=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=eos_token_ids,
        tie_word_embeddings=True,
    )


class RMSNorm(nn.Module):
    """Root-mean-square norm, statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]"""
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return x * scale.to(x.dtype) * self.weight.to(x.dtype)


class Linear(nn.Linear):
    """A bias-free linear map whose float32 master weight is cast to the activations' type."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]"""
        return F.linear(x, self.weight.to(x.dtype))


def rotary_table(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, head_dim / 2] of the interleaved rotary embedding, float32."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (2j, 2j+1) of x [B, L, heads, head_dim] by their position's angles."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: Ernie4_5_MoeConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries)
        self.k_proj = Linear(config.hidden_size, keys)
        self.v_proj = Linear(config.hidden_size, keys)
        self.o_proj = Linear(queries, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, H], additive causal mask [L, L] -> [B, L, H].

        Plain matrix products: at these lengths they train faster on CPUs than the fused kernel.
        """
        batch, length, _ = x.shape
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        groups = q.shape[2] // k.shape[2]
        q = q.transpose(1, 2).reshape(-1, length, self.head_dim)
        k, v = (t.transpose(1, 2).repeat_interleave(groups, 1).reshape(-1, length, self.head_dim) for t in (k, v))
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=self.head_dim**-0.5)
        mixed = torch.bmm(scores.softmax(-1), v)
        return self.o_proj(mixed.view(batch, -1, length, self.head_dim).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``: the dense layer and the shared experts."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[N, H] -> [N, H]"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _GroupedLinear(torch.autograd.Function):
    """Rows sorted by expert times each expert's own matrix, written into one buffer without copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        """x [P, in], weight [E, out, in], rows per expert -> [P, out]"""
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        y = x.new_empty(x.shape[0], weight.shape[1])
        for rows, out, matrix in zip(x.split(counts), y.split(counts), weight, strict=True):
            torch.mm(rows, matrix.t(), out=out)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        for rows, d_y, d_x, matrix, d_matrix in zip(
            x.split(ctx.counts), grad.split(ctx.counts), grad_x.split(ctx.counts), weight, grad_weight, strict=True
        ):
            torch.mm(d_y, matrix, out=d_x)
            torch.mm(d_y.t(), rows, out=d_matrix)
        return grad_x, grad_weight, None


class _Dispatch(torch.autograd.Function):
    """Copy each token to its K places in the experts' buffer; the gradient gathers them back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        """x [N, H], source [P], place [N*K] -> [P, H]"""
        ctx.save_for_backward(place)
        ctx.k = place.numel() // x.shape[0]
        return gather_or_zero(x, source // ctx.k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        (grad,) = grads
        return grad.index_select(0, place).view(-1, ctx.k, grad.shape[1]).sum(1), None, None


class _Collect(torch.autograd.Function):
    """Fetch the K results of each token from the experts' buffer; the gradient puts them back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, place: Tensor) -> Tensor:
        """rows [P, H], source [P], place [N*K] -> [N*K, H]"""
        ctx.save_for_backward(source)
        return rows.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (source,) = ctx.saved_tensors
        return gather_or_zero(grads[0], source), None, None


def gather_or_zero(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[index]``, where an index one past the end gives a row of zeros."""
    return torch.cat((rows, rows.new_zeros(1, rows.shape[1]))).index_select(0, index)


def assign(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Lay out a buffer of P rows in which each expert's tokens stand together.

    Every expert's share is rounded up to a multiple of `ROWS`, because the matrix library compiles a kernel for each
    new shape. From the chosen experts [N, K] follow ``source`` [P], the entry of `chosen` behind each row (N*K for an
    empty row), ``place`` [N*K], its inverse, and the rows of each expert.
    """
    flat = chosen.flatten()
    order = flat.argsort()
    counts = torch.bincount(flat, minlength=experts)
    padded = (counts + ROWS - 1) // ROWS * ROWS
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    rows = torch.arange(order.numel()) + shift[flat[order]]
    source = torch.full((int(padded.sum()),), order.numel()).scatter_(0, rows, order)
    place = torch.empty_like(order).scatter_(0, order, rows)
    return source, place, padded.tolist()


class Experts(nn.Module):
    """The routed experts' weights: ``gate_up_proj`` [E, 2I, H], ``down_proj`` [E, H, I]."""

    def __init__(self, config: Ernie4_5_MoeConfig) -> None:
        super().__init__()
        experts, hidden, width = config.moe_num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Rows in expert order [P, H] -> [P, H]"""
        gate, up = _GroupedLinear.apply(rows, self.gate_up_proj.to(rows.dtype), counts).chunk(2, -1)
        return _GroupedLinear.apply(F.silu(gate) * up, self.down_proj.to(rows.dtype), counts)


class Router(nn.Module):
    """Softmax gate in float32; the correction bias chooses experts but does not weigh them."""

    def __init__(self, config: Ernie4_5_MoeConfig) -> None:
        super().__init__()
        self.k, self.norm_min = config.moe_k, config.moe_norm_min
        self.weight = nn.Parameter(torch.empty(config.moe_num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.moe_num_experts))
        self.register_buffer("load", torch.zeros(config.moe_num_experts), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, H] -> combine weights [N, K] and expert indices [N, K]; counts the load since the last nudge."""
        scores = F.linear(x.float(), self.weight).softmax(-1)
        chosen = (scores.detach() + self.e_score_correction_bias).topk(self.k, -1).indices
        picked = scores.gather(-1, chosen)
        if self.training:
            self.load += torch.bincount(chosen.flatten(), minlength=self.load.numel())
        return picked / picked.sum(-1, keepdim=True).clamp(min=self.norm_min), chosen

    @torch.no_grad()
    def nudge(self, rate: float) -> None:
        """Raise the bias of experts with too little load, lower the others' (balancing without a loss term)."""
        self.e_score_correction_bias += rate * (self.load.mean() - self.load).sign()
        self.load.zero_()


class MoE(nn.Module):
    """Routed experts plus the shared ones, which every token passes."""

    def __init__(self, config: Ernie4_5_MoeConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.moe_intermediate_size * config.moe_num_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        """[N, H] -> [N, H]"""
        weights, chosen = self.gate(x)
        source, place, counts = assign(chosen, self.experts.gate_up_proj.shape[0])
        rows = self.experts(_Dispatch.apply(x, source, place), counts)
        rows = _Collect.apply(rows, source, place).view(*chosen.shape, -1)
        return torch.bmm(weights[:, None].to(x.dtype), rows)[:, 0] + self.shared_experts(x)


class Layer(nn.Module):
    """``x += attention(norm(x)); x += mlp(norm(x))``"""

    def __init__(self, config: Ernie4_5_MoeConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        is_moe = config.moe_layer_start_index <= index <= config.moe_layer_end_index
        self.mlp = MoE(config) if is_moe else SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """[B, L, H] -> [B, L, H]"""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x).flatten(0, 1)).view_as(x)


class TinyErnie(nn.Module):
    """Decoder with a tied head. Master weights are float32; activations have ``compute_dtype``."""

    def __init__(self, config: Ernie4_5_MoeConfig, compute_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.initialise()

    def initialise(self) -> None:
        """Begin as the identity: layers add nothing yet, and tokens stand out in the residual stream.

        The head is tied to the large embedding, so the last norm starts small to keep the first logits near zero.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        nn.init.constant_(self.norm.weight, 0.1)

    def hidden(self, ids: Tensor) -> Tensor:
        """Token ids [B, L] -> normed last hidden states [B, L, H]"""
        length = ids.shape[1]
        cos, sin = rotary_table(length, self.config.head_dim, self.config.rope_parameters["rope_theta"])
        mask = torch.full((length, length), float("-inf"), dtype=self.compute_dtype).triu(1)
        x = self.embed_tokens(ids).to(self.compute_dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """[..., H] -> logits [..., vocab], float32"""
        return F.linear(hidden, self.embed_tokens.weight.to(hidden.dtype)).float()

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, L] -> logits [B, L, vocab]"""
        return self.head(self.hidden(ids))

    def routers(self) -> list[Router]:
        """The gates of all expert layers."""
        return [module for module in self.modules() if isinstance(module, Router)]


def checkpoint_tensors(model: TinyErnie) -> dict[str, Tensor]:
    """The weights under the names of ERNIE's published PyTorch checkpoints: one tensor per expert and projection.

    Matrices are bfloat16; the router and its bias stay float32, as the published ones do.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        prefix, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            for expert, (gate, up) in enumerate(w.chunk(2) for w in value):
                tensors[f"model.{prefix}.{expert}.gate_proj.weight"] = gate
                tensors[f"model.{prefix}.{expert}.up_proj.weight"] = up
        elif leaf == "down_proj":
            for expert, down in enumerate(value):
                tensors[f"model.{prefix}.{expert}.down_proj.weight"] = down
        elif leaf == "e_score_correction_bias":
            tensors[f"model.{prefix.removesuffix('gate')}moe_statics.{leaf}"] = value[None]
        else:
            tensors[f"model.{name}"] = value
    router = (".mlp.gate.weight", ".e_score_correction_bias")
    return {
        name: value.to(torch.float32 if name.endswith(router) else torch.bfloat16).contiguous()
        for name, value in tensors.items()
    }


def save_checkpoint(model: TinyErnie, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` as an ordinary Hugging Face checkpoint.

    The config asks for float32: a network this small loses accuracy when it computes in bfloat16.
    """
    config = Ernie4_5_MoeConfig.from_dict(model.config.to_dict())
    config.architectures = ["Ernie4_5_MoeForCausalLM"]
    config.dtype = "float32"
    config.save_pretrained(folder)
    save_file(checkpoint_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
