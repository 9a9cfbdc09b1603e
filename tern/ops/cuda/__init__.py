"""Operations by Triton kernels on an NVIDIA GPU. Same names, arguments and results as the reference, but for the forms
in which one kernel hands rows to the next: `tern.ops.delta.ExpertOutputs` and `tern.ops.gpu_weights.Fp8Rows`.

Imported when a tensor lies on a GPU, or by a test: an installation for processors has no Triton and never looks for it.
"""

from tern.ops.cuda.attention import GpuPlan, attend, paged_attention
from tern.ops.cuda.drawing import draw
from tern.ops.cuda.experts import mix_experts, mixture
from tern.ops.cuda.matmul import linear, swiglu
from tern.ops.cuda.norms import add_rms_norm
from tern.ops.cuda.rotary import rotate_and_store
from tern.ops.cuda.rotary_table import rotary_table
from tern.ops.cuda.router import route
from tern.ops.cuda.sampling import keep_allowed, largest

__all__ = [
    "GpuPlan",
    "add_rms_norm",
    "attend",
    "draw",
    "keep_allowed",
    "largest",
    "linear",
    "mix_experts",
    "mixture",
    "paged_attention",
    "rotary_table",
    "rotate_and_store",
    "route",
    "swiglu",
]
