"""The arithmetic of the network, by function: the one door by which the model calls it.

Today every function is the reference in plain torch; a faster version of one takes its place here, under its name.
"""

from tern.ops.reference import (
    add_rms_norm,
    apply_rotary,
    embed,
    linear,
    mix_experts,
    rms_norm,
    rotary_frequencies,
    rotary_table,
    route,
    silu_mul,
    write_kv,
)
from tern.ops.reference_attention import AttentionPlan, paged_attention, plan_attention

__all__ = [
    "AttentionPlan",
    "add_rms_norm",
    "apply_rotary",
    "embed",
    "linear",
    "mix_experts",
    "paged_attention",
    "plan_attention",
    "rms_norm",
    "rotary_frequencies",
    "rotary_table",
    "route",
    "silu_mul",
    "write_kv",
]
