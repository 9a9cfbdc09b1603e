"""A GPU's limits, measured or from a data sheet, and the sizes of weights on it before there are any. Runs no network.

What a copy moves, read and written bytes together, stands for what kernels can read at most.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tern.bench.limits import REPEATS, MachineLimits, Sized, Work, measure_machine
from tern.bench.timer import Timer
from tern.checkpoint.quantisation import packed_bits, packed_shapes
from tern.engine import EngineOptions
from tern.engine.device import FP8_CAPABILITY, resolve_device
from tern.errors import OptionError
from tern.model import ErnieConfig, float32_parameters, parameter_shapes
from tern.ops import Fp8Weight, RowPackedWeight
from tern.ops.gpu_weights import BLOCK, FP8
from tern.ops.packed import GROUP

COPY_BYTES = 4 * 2**30  # far above a GPU's caches
MATRIX_SIZE = 8192
WARM_UP = 2


@dataclass(frozen=True)
class GpuLimits:
    """`copy_gb_s`: 10^9 bytes a second that a copy reads and writes, together; `bf16_tflops`, `fp8_tflops`: 10^12
    operations a second of a large product, fp8 None where the GPU has none; `memory_gb`: 10^9 bytes.
    """

    name: str
    memory_gb: float
    copy_gb_s: float
    bf16_tflops: float
    fp8_tflops: float | None = None

    @property
    def words(self) -> str:
        """The GPU and what it reaches."""
        fp8 = "" if self.fp8_tflops is None else f", {self.fp8_tflops:.0f} fp8"
        return f"{self.name}, moves {self.copy_gb_s:.0f} GB/s, {self.bf16_tflops:.0f} bf16 TFLOP/s{fp8}"

    def reading_seconds(self, work: Work) -> float:
        """The least time to read the work's bytes."""
        return work.read_bytes / (self.copy_gb_s * 1e9)

    def multiplying_seconds(self, work: Work) -> float:
        """The least time for its operations: those of fp8 weights in fp8 where the GPU can."""
        fp8 = self.fp8_tflops or self.bf16_tflops
        return work.operations / (self.bf16_tflops * 1e12) + work.fp8_operations / (fp8 * 1e12)


DATA_SHEETS = {
    "H100": GpuLimits("NVIDIA H100 SXM, by its data sheet", 80.0, 3350.0, 989.4, 1978.9),
    "H200": GpuLimits("NVIDIA H200 SXM, by its data sheet", 141.0, 4800.0, 989.4, 1978.9),
}
"""From NVIDIA's data sheets of the H100 and the H200 (SXM): dense products, half of what is printed for sparse ones."""


def take_device(name: str) -> torch.device:
    """The device that the engine's option of this name chooses; if it is one of several GPUs, kernels go there now.

    Raises `OptionError` if this machine has none such.
    """
    device = resolve_device(EngineOptions(device=name).device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def measure_device(device: torch.device) -> GpuLimits | MachineLimits:
    """The limits of a GPU, or those of the processor."""
    return measure_gpu(device) if device.type == "cuda" else measure_machine()


def measure_gpu(device: torch.device) -> GpuLimits:
    """Copy within the GPU's memory and multiply large matrices: the median of `REPEATS` runs of each."""
    properties = torch.cuda.get_device_properties(device)
    fp8 = (properties.major, properties.minor) >= FP8_CAPABILITY
    try:
        return GpuLimits(
            properties.name,
            properties.total_memory / 1e9,
            copy_rate(device, COPY_BYTES) / 1e9,
            product_rate(device, MATRIX_SIZE) / 1e12,
            fp8_product_rate(device, MATRIX_SIZE) / 1e12 if fp8 else None,
        )
    except torch.OutOfMemoryError:
        free = torch.cuda.mem_get_info(device)[0] / 1e9
        raise OptionError(
            f"{device} has {free:.1f} GB free, and measuring its limits takes {2 * COPY_BYTES / 1e9:.1f}: "
            "end what else uses the GPU, or choose another with --device."
        ) from None
    finally:
        torch.cuda.empty_cache()  # else what the copies took would not count as free
        torch.cuda.reset_peak_memory_stats(device)


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes a second, read and written ones together, of a copy of `size` bytes from the device to itself."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(device, lambda: target.copy_(source))


def product_rate(device: torch.device, size: int) -> float:
    """Operations a second of a product of two bfloat16 matrices [size, size]."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _median_seconds(device, lambda: torch.mm(a, b, out=out))


def fp8_product_rate(device: torch.device, size: int) -> float:
    """Operations a second of a product of two float8_e4m3fn matrices [size, size], each with one scale."""
    a, b = (torch.randn(size, size, device=device).to(FP8) for _ in range(2))
    one = torch.ones((), device=device)
    return (
        2
        * size**3
        / _median_seconds(
            device, lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        )
    )


def _median_seconds(device: torch.device, work: Callable[[], object]) -> float:
    timer = Timer(device)
    for _ in range(WARM_UP):
        work()
    return statistics.median([timer.device_seconds(work) for _ in range(REPEATS)])


def weight_sizes(config: ErnieConfig, quantization: str | None) -> dict[str, Sized]:
    """The network's weights as a GPU keeps them, without a byte of memory (on torch's "meta" device).

    `quantization` None is bfloat16; "fp8" and "block_wise_fp8" round what "wint8" packs.
    """
    shapes, wide = parameter_shapes(config), float32_parameters(config)
    if quantization is not None:
        shapes = packed_shapes(shapes, config)
    sizes: dict[str, Sized] = {}
    for name, shape in shapes.items():
        if quantization is None or packed_bits(name, "wint8") is None:
            sizes[name] = _meta(shape, torch.float32 if name in wide else torch.bfloat16)
        elif quantization in ("fp8", "block_wise_fp8"):
            scales = (1, 1) if quantization == "fp8" else tuple(-(-size // BLOCK) for size in shape[-2:])
            sizes[name] = Fp8Weight(_meta(shape, FP8), _meta((*shape[:-2], *scales), torch.float32))
        else:
            sizes[name] = _packed_size(shape, packed_bits(name, quantization))
    return sizes


def _packed_size(shape: tuple[int, ...], bits: int | None) -> RowPackedWeight:
    """A weight of whole numbers, row by row (see `RowPackedWeight`)."""
    *rows, inner = shape
    depth = -(-inner // BLOCK) * BLOCK
    scales = _meta(tuple(rows), torch.float32)
    if bits == 8:
        return RowPackedWeight(_meta((*rows, depth // 4), torch.int32), None, scales, inner)
    values = _meta((*rows, depth // 8), torch.int32)
    return RowPackedWeight(values, _meta((*rows, depth // GROUP), torch.int8), scales, inner)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
