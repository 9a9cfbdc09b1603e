"""Weights rounded on the GPU that keeps them, one matrix at a time. Knows what is rounded to what; knows no files.

A matrix arrives on the device in floats, is rounded there, and only what it is rounded to stays: beside the network
there is one matrix in floats, and what rounding a run of its rows takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from tern import ops
from tern.checkpoint.quantisation import FP8_QUANTIZATIONS, packed_bits
from tern.errors import CheckpointError
from tern.model import ErnieConfig
from tern.ops.gpu_weights import BLOCK
from tern.ops.packed import GROUP, round_up

ROUNDED_ROWS = 4096
"""Rows that are rounded together: the search for 4-bit factors keeps several float32 copies of them."""
SCALE_BYTES = 4

_Rounded = TypeVar("_Rounded", ops.RowPackedWeight, ops.Fp8Weight)


def round_matrices(
    name: str, shape: tuple[int, ...], matrices: Iterable[Tensor], quantization: str
) -> ops.RowPackedWeight | ops.Fp8Weight:
    """The parameter of this name and `shape` as a GPU's kernels read it.

    `matrices` on the device: the one [out, in], or a stack's, expert by expert. Their numbers are those of
    `pack_parameter`, or fp8. Raises `CheckpointError` for values that are not finite, which no scale could make so.
    """
    bits = packed_bits(name, quantization)
    assert bits is not None, f"{name} is not rounded"
    finite: list[Tensor] = []
    checked = _noted(matrices, finite)
    rounded: ops.RowPackedWeight | ops.Fp8Weight
    if quantization in FP8_QUANTIZATIONS:
        block_wise = FP8_QUANTIZATIONS[quantization]
        rounded = _gathered(shape, (ops.round_to_fp8(matrix, block_wise=block_wise) for matrix in checked))
    else:
        rounded = _gathered(shape, (_round_to_integers(matrix, bits) for matrix in checked))
    if not bool(torch.stack(finite).all()):  # asked once: every answer waits for the device
        raise CheckpointError(
            f"{name} holds values that are not finite and cannot be rounded: get the checkpoint again."
        )
    return rounded


def round_tied_head(tensors: dict[str, ops.Weight], config: ErnieConfig, quantization: str) -> None:
    """Give a network on a GPU whose head is its embedding a rounded copy for the head."""
    embedding = tensors["embed"]
    if config.tie_word_embeddings and isinstance(embedding, Tensor):
        tensors["head"] = round_matrices("head", tuple(embedding.shape), [embedding], quantization)


def rounded_bytes(name: str, shape: tuple[int, ...], quantization: str) -> int:
    """The bytes that `round_matrices` makes of a parameter."""
    *stack, rows, depth = shape
    count, whole = math.prod(stack), round_up(depth, BLOCK)
    if quantization in FP8_QUANTIZATIONS:
        block_wise = FP8_QUANTIZATIONS[quantization]
        scales = -(-rows // BLOCK) * -(-depth // BLOCK) if block_wise else 1
        return count * (rows * depth + scales * SCALE_BYTES)
    numbers = whole if packed_bits(name, quantization) == 8 else whole // 2 + whole // GROUP
    return count * rows * (numbers + SCALE_BYTES)


def _noted(matrices: Iterable[Tensor], finite: list[Tensor]) -> Iterator[Tensor]:
    """The matrices, each noted in `finite` as a bool on its device."""
    for matrix in matrices:
        finite.append(torch.stack(matrix.aminmax()).isfinite().all())  # NaN is both; no copy is made of the matrix
        yield matrix


def _round_to_integers(matrix: Tensor, bits: int) -> ops.RowPackedWeight:
    runs = []
    for rows in torch.split(matrix, ROUNDED_ROWS):
        wide = rows.float() if rows.dtype == torch.float16 else rows  # as `pack_parameter` has it
        runs.append(ops.RowPackedWeight.of(ops.pack(wide, bits)))
    return _with_tensors(runs[0], lambda name, _: torch.cat([getattr(run, name) for run in runs]))


def _gathered(shape: tuple[int, ...], weights: Iterable[_Rounded]) -> _Rounded:
    """The only weight, or for the shape of a stack, a stack that is filled as its weights come."""
    if len(shape) == 2:
        return next(iter(weights))
    stack: _Rounded | None = None
    for place, weight in enumerate(weights):
        if stack is None:
            stack = _with_tensors(weight, lambda _, tensor: tensor.new_empty((shape[0], *tensor.shape)))
        for name, tensor in _tensors(weight).items():
            getattr(stack, name)[place].copy_(tensor)
    assert stack is not None, "a stack has experts"
    return stack


def _tensors(weight: _Rounded) -> dict[str, Tensor]:
    """What a weight consists of, by the names of its fields."""
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _with_tensors(weight: _Rounded, make: Callable[[str, Tensor], Tensor]) -> _Rounded:
    made: dict[str, Any] = {name: make(name, tensor) for name, tensor in _tensors(weight).items()}
    return replace(weight, **made)
