"""Random weights for any network, the same for the same seed: for benchmarks, and for trying a size before owning it.

Knows the network's parameter shapes; knows no files. The scales are those of a freshly initialised network: linear
weights keep the variance of what they multiply, and those that write into the residual stream are damped by the number
of layers (as GPT-2 initialises them, Radford et al. 2019), so that activations stay near 1 however deep the network is
and logits have a standard deviation near 1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from tern.checkpoint.progress import byte_progress
from tern.model import ErnieConfig, float32_parameters, parameter_shapes

# Elements drawn by one random stream. A tensor is cut into such blocks, so that several threads can fill it and the
# result does not depend on how many there are.
BLOCK = 1 << 22
BIAS_STD = 0.02


def synthetic_tensors(
    config: ErnieConfig, seed: int, dtype: torch.dtype, device: torch.device, *, progress: bool = True
) -> dict[str, torch.Tensor]:
    """Every parameter of the network by canonical name, drawn in `dtype` and moved to `device` one by one.

    The values depend on `seed`, the parameter's name, its shape and `dtype`, and on nothing else.
    """
    shapes = parameter_shapes(config)
    wide = float32_parameters(config)
    dtypes = {name: torch.float32 if name in wide else dtype for name in shapes}
    total = sum(math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items())
    tensors = {}
    with (
        byte_progress("Making random weights", total, enabled=progress) as advance,
        ThreadPoolExecutor(torch.get_num_threads()) as pool,
    ):
        for name, shape in shapes.items():
            tensor = torch.empty(shape, dtype=dtypes[name])
            scale = _scale(name, shape, config)
            if scale is None:
                tensor.fill_(1.0)
            else:
                list(pool.map(partial(_draw, std=scale), *zip(*_blocks(tensor, seed, name), strict=True)))
            tensors[name] = tensor.to(device)
            advance(tensor.nbytes)
    return tensors


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
