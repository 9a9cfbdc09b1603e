"""Operations by Triton kernels on an NVIDIA GPU. Same names, arguments and results as the reference.

Imported when a tensor lies on a GPU, or by a test: an installation for processors has no Triton and never looks for it.
"""

from tern.ops.cuda.experts import mix_experts
from tern.ops.cuda.matmul import linear, swiglu
from tern.ops.cuda.norms import add_rms_norm

__all__ = ["add_rms_norm", "linear", "mix_experts", "swiglu"]
