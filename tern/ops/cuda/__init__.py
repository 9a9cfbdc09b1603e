"""Operations by Triton kernels on an NVIDIA GPU. Same names, arguments and results as the reference.

Imported when a tensor lies on a GPU, or by a test: an installation for processors has no Triton and never looks for it.
"""

from tern.ops.cuda.attention import GpuPlan, paged_attention
from tern.ops.cuda.drawing import draw
from tern.ops.cuda.experts import mix_experts, mixture
from tern.ops.cuda.matmul import linear, swiglu
from tern.ops.cuda.norms import add_rms_norm, add_rms_norm_to_fp8
from tern.ops.cuda.rotary import rotate_and_store
from tern.ops.cuda.router import route
from tern.ops.cuda.sampling import keep_allowed, largest

__all__ = [
    "GpuPlan",
    "add_rms_norm",
    "add_rms_norm_to_fp8",
    "draw",
    "keep_allowed",
    "largest",
    "linear",
    "mix_experts",
    "mixture",
    "paged_attention",
    "rotate_and_store",
    "route",
    "swiglu",
]
