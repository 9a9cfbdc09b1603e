"""Where each parameter of a network is kept and in which form, and the bytes that come of it. Knows names, no files.

A network lies on one device, or is split: attention, norms, routers, shared experts, dense layers, embedding and head
on a GPU, the routed experts, most of its bytes and few of its operations, packed on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tern import ops
from tern.checkpoint.gpu_rounding import rounded_bytes
from tern.checkpoint.quantisation import QUANTIZATIONS, ROUTED_EXPERTS, packed_bits, packed_shapes, parameter_bytes
from tern.errors import OptionError
from tern.model import ErnieConfig, parameter_shapes

CPU = torch.device("cpu")


def check_split(split: str, config: ErnieConfig) -> None:
    """Raise `OptionError` unless the routed experts of this network can stay on the CPU, packed as `split` says."""
    if split not in QUANTIZATIONS:
        raise OptionError(f"split is {split[:40]!r}: experts on the CPU are packed as {' or '.join(QUANTIZATIONS)}.")
    if not any(map(config.is_moe_layer, range(config.num_hidden_layers))):
        raise OptionError(
            "This network has no routed experts that could stay on the CPU: choose device cpu or cuda for all of it."
        )


@dataclass(frozen=True)
class Home:
    """One parameter's place. `quantization`: what it is rounded to, None for floats; `gpu`: in a GPU's layouts."""

    device: torch.device
    quantization: str | None
    gpu: bool


@dataclass(frozen=True)
class Residence:
    """A network on `device`, its linear weights rounded to `quantization` (None: floats).

    With `split`, "wint4" or "wint8", the routed experts lie on the CPU, packed so.
    """

    device: torch.device
    quantization: str | None
    split: str | None = None

    def home(self, name: str) -> Home:
        """The place of the parameter of this canonical name."""
        if self.split is not None and name.endswith(ROUTED_EXPERTS):
            return Home(CPU, self.split, gpu=False)
        rounded = self.quantization is not None and packed_bits(name, self.quantization) is not None
        return Home(self.device, self.quantization if rounded else None, ops.uses_gpu(self.device))


def weight_bytes(config: ErnieConfig, dtype: torch.dtype, quantization: str | None, *, gpu: bool = False) -> int:
    """The bytes of a whole network, its MTP block included, for the CPU or for a GPU."""
    return sum(_bytes_by_name(config, dtype, quantization, gpu=gpu).values())


def split_bytes(config: ErnieConfig, dtype: torch.dtype, quantization: str | None, split: str) -> tuple[int, int]:
    """The bytes of a network whose routed experts are on the CPU, packed as `split` says: on the GPU, on the CPU."""
    on_gpu = _bytes_by_name(config, dtype, quantization, gpu=True)
    on_cpu = _bytes_by_name(config, dtype, split, gpu=False)
    return (
        sum(size for name, size in on_gpu.items() if not name.endswith(ROUTED_EXPERTS)),
        sum(size for name, size in on_cpu.items() if name.endswith(ROUTED_EXPERTS)),
    )


def _bytes_by_name(config: ErnieConfig, dtype: torch.dtype, quantization: str | None, *, gpu: bool) -> dict[str, int]:
    shapes = parameter_shapes(config)
    if quantization is None:
        return parameter_bytes(shapes, config, dtype, None)
    shapes = packed_shapes(shapes, config)
    if not gpu:
        return parameter_bytes(shapes, config, dtype, quantization)
    floats = {name: shape for name, shape in shapes.items() if packed_bits(name, quantization) is None}
    sizes = parameter_bytes(floats, config, dtype, None)
    return {
        name: sizes[name] if name in floats else rounded_bytes(name, shape, quantization)
        for name, shape in shapes.items()
    }
