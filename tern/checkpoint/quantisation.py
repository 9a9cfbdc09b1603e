"""Which weights of a network are packed in how many bits, and packing them one at a time. Knows names, no files.

Packed are the linear weights and the experts: all but a hundredth of a mixture's weights, and nearly all that a token
reads. Kept as they are: norms and biases, which are small; routers and their correction biases in float32, because a
token's choice of experts hangs on small differences; the embedding, of which a token reads one row. The head is packed
in 8 bits at either width, and in fp8 beside fp8: every token's logits come from it, and an error there is an error of
the output itself. For a GPU the same weights are rounded by `gpu_rounding`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from tern import ops
from tern.errors import CheckpointError, OptionError
from tern.model import ErnieConfig, float32_parameters

QUANTIZATIONS = {"wint4": 4, "wint8": 8}
"""Bits of linear weights and experts that are packed as integers, by FastDeploy's names; for CPU and GPU."""
FP8_QUANTIZATIONS = {"fp8": False, "block_wise_fp8": True}
"""Whether every block of 128 x 128 numbers has a scale of its own, or the whole weight has one; for GPUs alone."""
FP8_BITS = 8
PLAIN = "none"
"""The name for keeping weights as floats where a checkpoint of few bits would be packed by default."""
HEAD_BITS = 8
ROUTED_EXPERTS = (".moe.gate_up", ".moe.down")
"""How the names of the stacks of routed experts end."""
CHECKED_ROWS = (
    4096  # looked at together for values that are not finite: a mask of a whole head would take as much again
)
PACKED_METHOD, PACKED_FORMAT = "tern", 1
"""What `quantization_config` of a packed checkpoint calls its method and the version of its layout."""
UNFINISHED = "unfinished.json"
"""The file that marks a packed checkpoint which is still being written."""


def check_quantization(name: str, device: torch.device) -> None:
    """Raise `OptionError` unless weights can be rounded as `name` says and multiplied on `device`."""
    if name not in QUANTIZATIONS and name not in FP8_QUANTIZATIONS:
        known = ", ".join((*QUANTIZATIONS, *FP8_QUANTIZATIONS, PLAIN))
        raise OptionError(f"quantization is {name[:40]!r}: it must be one of {known}.")
    if ops.uses_gpu(device):
        return
    if device.type != "cpu":
        raise OptionError(f"quantization is {name!r}, but the device is {device}: packed weights run on CPUs and GPUs.")
    if name in FP8_QUANTIZATIONS:
        raise OptionError(
            f"quantization is {name!r}, but the device is the CPU, which does not multiply fp8: "
            "choose wint8, which takes as much memory, or an NVIDIA GPU."
        )


def choose_quantization(asked: str | None, default: str | None, device: torch.device) -> str | None:
    """The form to load in: what was asked for, else the checkpoint's `default`; None for floats.

    Raises `OptionError` unless weights can be rounded as asked and multiplied on `device`.
    """
    if asked is None:
        return default
    if asked == PLAIN:
        return None
    check_quantization(asked, device)
    return asked


def packed_bits(name: str, quantization: str) -> int | None:
    """Bits to which the parameter of this canonical name is rounded; None for one that stays as it is."""
    if name == "head":
        return HEAD_BITS
    if name.endswith((".weight", *ROUTED_EXPERTS)):
        return QUANTIZATIONS.get(quantization, FP8_BITS)
    return None


def packed_parts(name: str) -> int:
    """How many parts of its rows begin a panel of their own: gate and up do."""
    return 2 if "gate_up" in name else 1


def pack_parameter(name: str, tensor: torch.Tensor, quantization: str) -> ops.Weight:
    """The parameter as the network keeps it: packed, or the tensor itself.

    Raises `CheckpointError` for a weight that holds NaN or an infinity, which no scale could make finite.
    """
    bits = packed_bits(name, quantization)
    if bits is None:
        return tensor
    if not all(bool(rows.isfinite().all()) for rows in torch.split(tensor.flatten(0, -2), CHECKED_ROWS)):
        raise CheckpointError(
            f"{name} holds values that are not finite and cannot be packed: get the checkpoint again."
        )
    # The kernels that pack read float32 and bfloat16.
    wide = tensor.float() if tensor.dtype == torch.float16 else tensor
    return ops.pack(wide, bits, packed_parts(name))


def pack_stack(
    name: str, shape: tuple[int, ...], experts: Iterable[torch.Tensor], quantization: str
) -> ops.PackedWeight:
    """A stack of experts [experts, out, in], packed one after the other; errors as in `pack_parameter`."""
    stack = ops.empty(shape, QUANTIZATIONS[quantization], packed_parts(name))
    for place, tensor in enumerate(experts):
        packed = pack_parameter(name, tensor, quantization)
        assert isinstance(packed, ops.PackedWeight)
        stack[place].copy_(packed)
    return stack


def pack_tied_head(tensors: dict[str, ops.Weight], config: ErnieConfig, quantization: str) -> None:
    """Give a network whose head is its embedding a packed copy for the head."""
    embedding = tensors.get("embed")
    if config.tie_word_embeddings and isinstance(embedding, torch.Tensor):
        tensors["head"] = pack_parameter("head", embedding, quantization)


def packed_shapes(shapes: Mapping[str, tuple[int, ...]], config: ErnieConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of a packed network: those of `parameter_shapes`, and a head of its own where that is tied."""
    return {**shapes, "head": shapes["embed"]} if config.tie_word_embeddings else dict(shapes)


def parameter_bytes(
    shapes: Mapping[str, tuple[int, ...]], config: ErnieConfig, dtype: torch.dtype, quantization: str | None
) -> dict[str, int]:
    """The bytes that each of these parameters takes in memory for the CPU and in a file."""
    wide = float32_parameters(config)
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        bits = None if quantization is None else packed_bits(name, quantization)
        if bits is None:
            sizes[name] = math.prod(shape) * (4 if name in wide else dtype.itemsize)
            continue
        parts = ops.packed_shapes(shape, bits, packed_parts(name))
        sizes[name] = sum(math.prod(part) * (4 if kind == "scales" else 1) for kind, part in parts.items())
    return sizes
