"""Random weights for any network, the same for the same seed: for benchmarks, and for trying a size before owning it.

Knows the network's parameter shapes; knows no files. The scales are those of a freshly initialised network: linear
weights keep the variance of what they multiply, and those that write into the residual stream are damped by the number
of layers (as GPT-2 initialises them, Radford et al. 2019), so that activations stay near 1 however deep the network is
and logits have a standard deviation near 1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from tern import ops
from tern.checkpoint.gpu_rounding import round_matrices, round_tied_head
from tern.checkpoint.progress import byte_progress
from tern.checkpoint.quantisation import FP8_QUANTIZATIONS, QUANTIZATIONS, packed_bits, packed_parts, packed_shapes
from tern.checkpoint.residence import Home, Residence
from tern.model import ErnieConfig, float32_parameters, parameter_shapes

# Elements drawn by one random stream. A tensor is cut into such blocks, so that several threads can fill it and the
# result does not depend on how many there are.
BLOCK = 1 << 22
BIAS_STD = 0.02
# The standard deviation of a packed weight's integers when its bytes are drawn evenly: of factor * q, and of v.
PACKED_STD = {4: math.sqrt(21.5 * 25.5), 8: math.sqrt((2**16 - 1) / 12 + 0.25)}


def synthetic_tensors(
    config: ErnieConfig,
    seed: int,
    dtype: torch.dtype,
    residence: Residence,
    *,
    progress: bool = True,
) -> dict[str, ops.Weight]:
    """Every parameter of the network by canonical name, drawn in `dtype` and moved to its place one by one.

    Weights that are packed as integers are drawn packed: random bytes, not packed Gaussians; fp8 is what is drawn in
    floats, rounded. The values depend on
    `seed`, the parameter's name, its shape, `dtype` and what it is rounded to, and on nothing else.
    """
    shapes = parameter_shapes(config)
    if residence.quantization in QUANTIZATIONS:
        shapes = packed_shapes(shapes, config)
    total = sum(map(math.prod, shapes.values()))
    tensors: dict[str, ops.Weight] = {}
    with byte_progress("Making random weights", total, enabled=progress) as advance:
        drawn = synthetic_parameters(shapes, config, seed, dtype, lambda name: residence.home(name).quantization)
        for name, weight in drawn:
            tensors[name] = _at_home(name, weight, residence.home(name))
            advance(math.prod(shapes[name]))
    if residence.quantization in FP8_QUANTIZATIONS:
        round_tied_head(tensors, config, residence.quantization)
    return tensors


def _at_home(name: str, weight: torch.Tensor | ops.PackedWeight, home: Home) -> ops.Weight:
    """What was drawn, on its device and in the form that is kept there."""
    if isinstance(weight, ops.PackedWeight):
        return ops.RowPackedWeight.of(weight.to(home.device)) if home.gpu else weight
    if home.quantization is None:
        return weight.to(home.device)
    matrices = weight if weight.dim() == 3 else [weight]
    return round_matrices(name, tuple(weight.shape), (each.to(home.device) for each in matrices), home.quantization)


def synthetic_parameters(
    shapes: Mapping[str, tuple[int, ...]],
    config: ErnieConfig,
    seed: int,
    dtype: torch.dtype,
    quantization: Callable[[str], str | None],
) -> Iterator[tuple[str, torch.Tensor | ops.PackedWeight]]:
    """Draw these parameters of the network, one after the other; see `synthetic_tensors`.

    `quantization` says by name what a parameter is rounded to; what becomes fp8 is drawn in floats.
    """
    wide = float32_parameters(config)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, shape in shapes.items():
            scale = _scale(name, shape, config)
            form = quantization(name)
            bits = packed_bits(name, form) if form in QUANTIZATIONS else None
            if bits is not None:
                weight = ops.empty(shape, bits, packed_parts(name))
                weight.scales.fill_((scale or 0.0) / PACKED_STD[bits])
                for part, drawn in (("values", weight.values), ("factors", weight.factors)):
                    if drawn is not None:
                        list(pool.map(_draw_bytes, *zip(*_blocks(drawn, seed, f"{name}/{part}"), strict=True)))
                yield name, weight
                continue
            tensor = torch.empty(shape, dtype=torch.float32 if name in wide else dtype)
            if scale is None:
                tensor.fill_(1.0)
            else:
                list(pool.map(partial(_draw, std=scale), *zip(*_blocks(tensor, seed, name), strict=True)))
            yield name, tensor


def _scale(name: str, shape: tuple[int, ...], config: ErnieConfig) -> float | None:
    """The standard deviation of a parameter's values, or None for a norm's weights, which are all 1."""
    if name.endswith("norm"):
        return None
    if name.endswith("correction_bias"):
        # Probabilities are near 1/E: enough to change some choices of experts, not enough to make all of them.
        return 0.25 / config.moe_num_experts
    if name.endswith(".bias"):
        return BIAS_STD
    writes_residual = name.endswith(("attn.o.weight", ".down", ".down.weight"))
    return 1.0 / math.sqrt(shape[-1] * (2 * config.num_hidden_layers if writes_residual else 1))


def _blocks(tensor: torch.Tensor, seed: int, name: str) -> Iterator[tuple[torch.Tensor, int]]:
    """The blocks of a tensor, each with the seed of its random stream."""
    for index, block in enumerate(torch.split(tensor.view(-1), BLOCK)):
        digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
        yield block, int.from_bytes(digest[:8], "little", signed=True)


def _draw(block: torch.Tensor, seed: int, std: float) -> None:
    generator = torch.Generator()
    generator.manual_seed(seed)
    block.normal_(0.0, std, generator=generator)


def _draw_bytes(block: torch.Tensor, seed: int) -> None:
    words = np.random.SFC64(seed & (2**64 - 1)).random_raw(-(-len(block) // 8))
    block.copy_(torch.from_numpy(words.view(np.uint8)[: len(block)]))
