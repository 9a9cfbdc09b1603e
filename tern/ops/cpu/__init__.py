"""Operations by the C++ kernels in `csrc`. Same names, arguments and results as the reference."""

from tern.ops.cpu.layers import (
    SequencesPlan,
    add_rms_norm,
    can_attend,
    can_norm,
    paged_attention,
    rotate_and_store,
    route,
    silu_mul,
)
from tern.ops.cpu.machine import (
    FORCE_ISA,
    NUM_THREADS,
    InstructionSet,
    choose_instruction_set,
    choose_threads,
    instruction_sets,
    machine,
    usable_processors,
    use_machine,
)
from tern.ops.cpu.packed import linear_packed, mix_experts_packed, pack, swiglu_packed
from tern.ops.cpu.sampling import can_choose, draw, keep_allowed, largest

__all__ = [
    "FORCE_ISA",
    "NUM_THREADS",
    "InstructionSet",
    "SequencesPlan",
    "add_rms_norm",
    "can_attend",
    "can_choose",
    "can_norm",
    "choose_instruction_set",
    "choose_threads",
    "draw",
    "instruction_sets",
    "largest",
    "keep_allowed",
    "linear_packed",
    "machine",
    "mix_experts_packed",
    "pack",
    "paged_attention",
    "rotate_and_store",
    "route",
    "silu_mul",
    "swiglu_packed",
    "usable_processors",
    "use_machine",
]
