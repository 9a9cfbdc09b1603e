"""The layouts in which checkpoints store the network, as one table: name in the file -> canonical tensor and its part.

Knows every name that a loader meets; knows no files and no sizes. Five layouts occur, and a checkpoint may mix them:

- PT: one tensor per projection and per expert, prefix `model.`;
- transformers 5 in memory: a layer's experts fused, `[E, 2I, H]` and `[E, H, I]`, the correction bias under `gate`;
- Paddle: prefix `ernie.`, `qkv_proj` and `up_gate_proj` fused (Q before K before V, and, despite the name, gate before
  up), linear weights stored `[in, out]`;
- the MTP block, in either naming;
- GGUF: names of its own (`blk.0.attn_q.weight`), a layer's experts stacked by projection, never transposed.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

UNUSED = "unused"


class Kind(Enum):
    """How a file's tensor relates to the canonical one."""

    PLAIN = "the same shape"
    LINEAR = "[out, in], or [in, out] in Paddle's orientation"
    ROW = "the same after leading dimensions of 1 are dropped"


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    `source` is the name in the file without its prefix, `#` standing for a number: the layer, then the expert.
    `target` is the canonical name, `{}` standing for the layer. `part` names the rows filled, None means all of them.
    `gguf` tells GGUF's names from the others.
    """

    source: str
    target: str
    part: str | None = None
    kind: Kind = Kind.PLAIN
    gguf: bool = False

    @property
    def expert_wise(self) -> bool:
        """Whether the tensor belongs to a single routed expert."""
        return ".experts.#." in self.source


def _linear(source: str, target: str, part: str | None = None) -> list[Rule]:
    """A projection: its weight and its bias."""
    return [
        Rule(f"{source}.weight", f"{target}.weight", part, Kind.LINEAR),
        Rule(f"{source}.bias", f"{target}.bias", part),
    ]


def _swiglu(source: str, target: str) -> list[Rule]:
    return [
        *_linear(f"{source}.gate_proj", f"{target}.gate_up", "gate"),
        *_linear(f"{source}.up_proj", f"{target}.gate_up", "up"),
        *_linear(f"{source}.up_gate_proj", f"{target}.gate_up"),
        *_linear(f"{source}.down_proj", f"{target}.down"),
    ]


def _dense_layer(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.input_layernorm.weight", f"{target}.attn_norm"),
        *_linear(f"{source}.self_attn.q_proj", f"{target}.attn.qkv", "q"),
        *_linear(f"{source}.self_attn.k_proj", f"{target}.attn.qkv", "k"),
        *_linear(f"{source}.self_attn.v_proj", f"{target}.attn.qkv", "v"),
        *_linear(f"{source}.self_attn.qkv_proj", f"{target}.attn.qkv"),
        *_linear(f"{source}.self_attn.o_proj", f"{target}.attn.o"),
        Rule(f"{source}.post_attention_layernorm.weight", f"{target}.mlp_norm"),
        *_swiglu(f"{source}.mlp", f"{target}.mlp"),
    ]


def _experts(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.gate.weight", f"{target}.router", kind=Kind.LINEAR),
        Rule(f"{source}.moe_statics.e_score_correction_bias", f"{target}.correction_bias", kind=Kind.ROW),
        Rule(f"{source}.gate.moe_statics.e_score_correction_bias", f"{target}.correction_bias", kind=Kind.ROW),
        Rule(f"{source}.experts.#.gate_proj.weight", f"{target}.gate_up", "gate", Kind.LINEAR),
        Rule(f"{source}.experts.#.up_proj.weight", f"{target}.gate_up", "up", Kind.LINEAR),
        Rule(f"{source}.experts.#.up_gate_proj.weight", f"{target}.gate_up", kind=Kind.LINEAR),
        Rule(f"{source}.experts.#.down_proj.weight", f"{target}.down", kind=Kind.LINEAR),
        Rule(f"{source}.experts.gate_up_proj", f"{target}.gate_up"),
        Rule(f"{source}.experts.down_proj", f"{target}.down"),
        *_swiglu(f"{source}.shared_experts", f"{target}.shared"),
    ]


# Where several rules fill the same rows, the PT name comes first: a missing tensor is reported under it.
RULES = (
    Rule("embed_tokens.weight", "embed"),
    *_dense_layer("layers.#", "layers.{}"),
    *_experts("layers.#.mlp", "layers.{}.moe"),
    Rule("norm.weight", "norm"),
    Rule("lm_head.weight", "head", kind=Kind.LINEAR),
    Rule("lm_head.bias", "head.bias"),
    Rule("mtp_emb_norm.0.weight", "mtp.emb_norm"),
    Rule("mtp_hidden_norm.0.weight", "mtp.hidden_norm"),
    *_linear("mtp_linear_proj.0", "mtp.proj"),
    *_dense_layer("mtp_block.0", "mtp.block"),
    # Buffers that older tools saved beside the weights; the network computes them itself.
    Rule("rotary_emb.inv_freq", UNUSED),
    Rule("layers.#.self_attn.rotary_emb.inv_freq", UNUSED),
)

_GGUF_LINEAR = {
    "attn_q": ("attn.qkv", "q"),
    "attn_k": ("attn.qkv", "k"),
    "attn_v": ("attn.qkv", "v"),
    "attn_qkv": ("attn.qkv", None),
    "attn_output": ("attn.o", None),
    "ffn_gate": ("mlp.gate_up", "gate"),
    "ffn_up": ("mlp.gate_up", "up"),
    "ffn_down": ("mlp.down", None),
    "ffn_gate_shexp": ("moe.shared.gate_up", "gate"),
    "ffn_up_shexp": ("moe.shared.gate_up", "up"),
    "ffn_down_shexp": ("moe.shared.down", None),
}
_GGUF_OTHERS = {
    "token_embd.weight": ("embed", None, Kind.PLAIN),
    "output_norm.weight": ("norm", None, Kind.PLAIN),
    "output.weight": ("head", None, Kind.PLAIN),
    "output.bias": ("head.bias", None, Kind.PLAIN),
    "blk.#.attn_norm.weight": ("layers.{}.attn_norm", None, Kind.PLAIN),
    "blk.#.ffn_norm.weight": ("layers.{}.mlp_norm", None, Kind.PLAIN),
    "blk.#.ffn_gate_inp.weight": ("layers.{}.moe.router", None, Kind.PLAIN),
    "blk.#.exp_probs_b.bias": ("layers.{}.moe.correction_bias", None, Kind.ROW),
    "blk.#.ffn_gate_exps.weight": ("layers.{}.moe.gate_up", "gate", Kind.PLAIN),
    "blk.#.ffn_up_exps.weight": ("layers.{}.moe.gate_up", "up", Kind.PLAIN),
    "blk.#.ffn_gate_up_exps.weight": ("layers.{}.moe.gate_up", None, Kind.PLAIN),
    "blk.#.ffn_down_exps.weight": ("layers.{}.moe.down", None, Kind.PLAIN),
}
GGUF_RULES = (
    *(Rule(source, target, part, kind, gguf=True) for source, (target, part, kind) in _GGUF_OTHERS.items()),
    *(
        Rule(f"blk.#.{source}.{kind}", f"layers.{{}}.{target}.{kind}", part, gguf=True)
        for source, (target, part) in _GGUF_LINEAR.items()
        for kind in ("weight", "bias")
    ),
)

_RULE_OF_SOURCE = {rule.source: rule for rule in (*RULES, *GGUF_RULES)}
_PREFIX = re.compile(r"^(model|ernie)\.")
_LAYER = re.compile(r"^(layers|blk)\.(0|[1-9][0-9]{0,5})\.")
_EXPERT = re.compile(r"\.experts\.(0|[1-9][0-9]{0,5})\.")


@dataclass(frozen=True)
class Match:
    """What a stored tensor is: the rule that knows it, the canonical tensor it belongs to, and which expert's it is."""

    rule: Rule
    target: str
    expert: int | None


def match_name(name: str) -> Match | None:
    """Look a file's tensor name up in the table; None if no rule knows it."""
    bare = _PREFIX.sub("", name, count=1)
    layer, expert = _LAYER.search(bare), _EXPERT.search(bare)
    rule = _RULE_OF_SOURCE.get(_EXPERT.sub(".experts.#.", _LAYER.sub(r"\1.#.", bare)))
    if rule is None:
        return None
    return Match(rule, rule.target.format(layer[2] if layer else ""), int(expert[1]) if expert else None)


def parts_of(target: str) -> tuple[str | None, ...]:
    """The parts that a canonical tensor is stored in when it is not stored whole, in the order of its rows."""
    parts = (rule.part for rule in _rules_for(target))
    return tuple(dict.fromkeys(part for part in parts if part)) or (None,)


def has_experts(target: str) -> bool:
    """Whether a canonical tensor holds one slice per routed expert in its first dimension."""
    return any(rule.expert_wise for rule in _rules_for(target))


def name_of(
    target: str, part: str | None, expert: int | None, *, known: Set[str], prefix: str, gguf: bool = False
) -> str:
    """The name under which a checkpoint would store this part of a canonical tensor, with `prefix` before it.

    `known` are the sources of the rules that other tensors of the checkpoint follow: a layout that is in use there
    gives the name, otherwise GGUF's where `gguf` says so, else PT's.
    """
    candidates = [rule for rule in _rules_for(target) if rule.part in (part, None) and rule.gguf == gguf]
    exact = [rule for rule in candidates if rule.part == part and rule.expert_wise == (expert is not None and not gguf)]
    rule = next((rule for rule in candidates if rule.source in known), exact[0])
    layer = _LAYER.search(target)
    name = rule.source.replace(".experts.#.", f".experts.{expert}.").replace("#", layer[2] if layer else "#")
    return name if gguf or name.startswith("lm_head") else prefix + name


@lru_cache(maxsize=4096)
def _rules_for(target: str) -> tuple[Rule, ...]:
    template = _LAYER.sub("layers.{}.", target)
    return tuple(rule for rule in (*RULES, *GGUF_RULES) if rule.target == template)
