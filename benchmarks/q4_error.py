"""What rounding costs a layer's output: Tern's 4 and 8 bits beside Q4_0, fp8 and bfloat16, on layers of the full size.

    python -m benchmarks.q4_error [--model dummy:ernie-4.5-21b-a3b] [--json FILE]

The error of y = x W' beside y = x W is |y' - y| / |y| over all rows and outputs, x in float64 and unrounded: what the
weights' rounding alone does. Weights are drawn from a normal distribution and from Student's t with 4 degrees of
freedom, whose tails are heavier than most layers'; x from a normal one, plain or with a few channels 20 times as large,
as networks have them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tern import ops
from tern.checkpoint import resolve_model
from tern.model import ErnieConfig, parameter_shapes
from tern.ops.packed import unpack

ROWS = 32
SLICE = 4096
"""Outputs rounded at a time: formats round each output's weights, or groups of them, by themselves."""
OUTLIERS, OUTLIER_SIZE = 4, 20.0
Q4_GROUP = 32
FP8_MOST = 448.0


def round_q4_0(weight: Tensor) -> Tensor:
    """GGML's Q4_0: groups of 32 along the inputs, d = the value of largest magnitude / -8 in float16, q in -8..7.

    [out, in] float32 -> the weights that the file stands for.
    """
    groups = weight.view(len(weight), -1, Q4_GROUP)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale = largest / -8
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    q = (groups * inverse + 8.5).to(torch.int8).clamp(max=15) - 8
    return (q * scale.half().float()).view_as(weight)


def round_fp8(weight: Tensor) -> Tensor:
    """e4m3 with one float scale an output, its largest weight at the format's largest."""
    scale = weight.abs().amax(1, keepdim=True) / FP8_MOST
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "wint4": lambda weight: unpack(ops.pack(weight, 4)),
    "Q4_0": round_q4_0,
    "wint8": lambda weight: unpack(ops.pack(weight, 8)),
    "fp8": round_fp8,
    "bf16": lambda weight: weight.bfloat16().float(),
}


@dataclass(frozen=True)
class Errors:
    """One layer under one distribution of weights and of inputs: the relative error of each format's output."""

    layer: str
    weights: str
    inputs: str
    errors: dict[str, float]


def layers(config: ErnieConfig) -> dict[str, tuple[int, int]]:
    """The kinds of layers that a token meets in a mixture's block, and the head: [out, in]."""
    shapes = parameter_shapes(config)
    last = f"layers.{config.num_hidden_layers - 1}."
    names = {
        "qkv": f"{last}attn.qkv.weight",
        "o": f"{last}attn.o.weight",
        "gate_up of an expert": f"{last}moe.gate_up",
        "down of an expert": f"{last}moe.down",
        "head": "embed",
    }
    return {layer: (shapes[name][-2], shapes[name][-1]) for layer, name in names.items() if name in shapes}


def draw_weights(kind: str, out: int, inputs: int, generator: torch.Generator) -> Tensor:
    """[out, inputs] float32 of variance 1 / inputs. Student's t is a normal over the root of a chi-squared / 4."""
    weight: Tensor = torch.randn(out, inputs, generator=generator) / inputs**0.5
    if kind == "t4":
        squares = torch.zeros(out, inputs)
        for _ in range(4):
            squares += torch.randn(out, inputs, generator=generator).square()
        weight /= (squares / 4).sqrt() * 2**0.5  # the variance of t with 4 degrees is 2
    return weight


def draw_inputs(kind: str, inputs: int, generator: torch.Generator) -> Tensor:
    """[`ROWS`, inputs] float64."""
    x = torch.randn(ROWS, inputs, generator=generator, dtype=torch.float64)
    if kind == "outliers":
        x[:, torch.randperm(inputs, generator=generator)[:OUTLIERS]] *= OUTLIER_SIZE
    return x


def measure(config: ErnieConfig) -> Iterator[Errors]:
    """Every layer under every distribution."""
    for number, (layer, (out, inputs)) in enumerate(layers(config).items()):
        for kind in ("normal", "t4"):
            for spread in ("normal", "outliers"):
                generator = torch.Generator().manual_seed(number)
                x = draw_inputs(spread, inputs, generator)
                yield Errors(layer, kind, spread, _errors(kind, out, x, generator))


def _errors(kind: str, out: int, x: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Of each format, over all outputs, drawn and rounded some at a time."""
    wrong, whole = dict.fromkeys(FORMATS, 0.0), 0.0
    for start in range(0, out, SLICE):
        weight = draw_weights(kind, min(SLICE, out - start), x.shape[1], generator)
        right = x @ weight.double().T
        whole += right.square().sum().item()
        for name, rounded in FORMATS.items():
            wrong[name] += (x @ rounded(weight).double().T - right).square().sum().item()
    return {name: (error / whole) ** 0.5 for name, error in wrong.items()}


def main() -> None:
    """Measure and print."""
    made = argparse.ArgumentParser(description="Relative output errors of rounded weights.")
    made.add_argument("--model", default="dummy:ernie-4.5-21b-a3b", help="whose layers' sizes")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the errors here as well")
    arguments = made.parse_args()
    table = Table(title=f"relative error of the output, {arguments.model}")
    for name in ("layer", "weights", "inputs", *FORMATS):
        table.add_column(name, justify="right" if name in FORMATS else "left")
    found = []
    for errors in measure(resolve_model(arguments.model, weights=False).config):
        found.append(asdict(errors))
        shown = [f"{error:.2%}" for error in errors.errors.values()]
        table.add_row(errors.layer, errors.weights, errors.inputs, *shown)
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
