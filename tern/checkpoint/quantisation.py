"""Which weights of a network are packed in how many bits, and packing them one at a time. Knows names, no files.

Packed are the linear weights and the experts: all but a hundredth of a mixture's weights, and nearly all that a token
reads. Kept as they are: norms and biases, which are small; routers and their correction biases in float32, because a
token's choice of experts hangs on small differences; the embedding, of which a token reads one row. The head is packed
in 8 bits at either width: every token's logits come from it, and an error there is an error of the output itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from tern import ops
from tern.errors import CheckpointError, OptionError
from tern.model import ErnieConfig, float32_parameters, parameter_shapes

QUANTIZATIONS = {"wint4": 4, "wint8": 8}
"""Bits of linear weights and experts, by FastDeploy's names."""
PLAIN = "none"
"""The name for keeping weights as floats where a checkpoint of few bits would be packed by default."""
HEAD_BITS = 8
CHECKED_ROWS = (
    4096  # looked at together for values that are not finite: a mask of a whole head would take as much again
)
PACKED_METHOD, PACKED_FORMAT = "tern", 1
"""What `quantization_config` of a packed checkpoint calls its method and the version of its layout."""
UNFINISHED = "unfinished.json"
"""The file that marks a packed checkpoint which is still being written."""


def check_quantization(name: str, device: torch.device) -> None:
    """Raise `OptionError` unless weights can be packed as `name` says and multiplied on `device`."""
    if name not in QUANTIZATIONS:
        raise OptionError(f"quantization is {name[:40]!r}: it must be one of {', '.join((*QUANTIZATIONS, PLAIN))}.")
    if device.type != "cpu":
        raise OptionError(f"quantization is {name!r}, but the device is {device}: packed weights run on the CPU.")


def choose_quantization(asked: str | None, default: str | None, device: torch.device) -> str | None:
    """The packing to load with: what was asked for, else on the CPU the checkpoint's `default`; None for floats.

    Raises `OptionError` unless weights can be packed as asked and multiplied on `device`.
    """
    if asked is None:
        return default if device.type == "cpu" else None
    if asked == PLAIN:
        return None
    check_quantization(asked, device)
    return asked


def packed_bits(name: str, quantization: str) -> int | None:
    """Bits in which the parameter of this canonical name is packed; None for one that stays as it is."""
    if name == "head":
        return HEAD_BITS
    if name.endswith((".weight", ".moe.gate_up", ".moe.down")):
        return QUANTIZATIONS[quantization]
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
    """The bytes that each of these parameters takes in memory and in a file."""
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


def weight_bytes(config: ErnieConfig, dtype: torch.dtype, quantization: str | None) -> int:
    """The bytes of a whole network, its MTP block included."""
    shapes = parameter_shapes(config)
    if quantization is not None:
        shapes = packed_shapes(shapes, config)
    return sum(parameter_bytes(shapes, config, dtype, quantization).values())
