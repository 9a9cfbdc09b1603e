"""`tern bench`: the speed of prefill and decode steps, and the share of this machine's limits that they reach."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from tern.errors import OptionError

if TYPE_CHECKING:
    from tern.bench import BenchResult

MOST_TOKENS = 2**20


def bench(
    model: Annotated[str | None, typer.Option(help="Directory, .gguf file, hub id or dummy:PRESET.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="wint4 or wint8: pack weights while loading; none: never.")
    ] = None,
    prefill: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "512",
    decode: Annotated[str, typer.Option(help="Numbers of sequences that decode together.")] = "1",
    depth: Annotated[str, typer.Option(help="Tokens that are in the cache already.")] = "0",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
) -> None:
    """Time prefill and decode steps of a model, each as a share of what this machine could do at most."""
    lengths, sequences = _numbers("--prefill", prefill, 1), _numbers("--decode", decode, 1)
    depths = _numbers("--depth", depth, 0) or [0]

    from tern.bench import run_bench
    from tern.checkpoint import resolve_model

    report = run_bench(
        resolve_model(model, revision=revision),
        quantization=quantization,
        prefill=lengths,
        decode=sequences,
        depths=depths,
        on_result=(lambda _: None) if as_json else _print,
    )
    if as_json:
        typer.echo(json.dumps(report.as_json()))
        return
    limits = report.machine
    typer.echo(
        f"{limits.isa}, {limits.threads} threads: reads {limits.read_gb_s:.1f} GB/s, {limits.int8_tops:.2f} int8 TOPS; "
        f"loaded in {report.load_s:.1f} s, at most {report.peak_rss_gb:.1f} GB of memory."
    )


def _print(result: BenchResult) -> None:
    what = f"{result.tokens} tokens" if result.kind == "prefill" else f"{result.sequences} sequences"
    typer.echo(
        f"{result.kind:7}  {what:>14}  depth {result.depth:>6}  {result.tokens_per_s:9.1f} tokens/s  "
        f"{result.limit_share:4.0%} of the limit"
    )


def _numbers(flag: str, text: str, least: int) -> list[int]:
    """A list such as `512,2048`; empty text is no number."""
    numbers = []
    for part in filter(None, map(str.strip, text.split(","))):
        if not (part.isascii() and part.isdigit()) or not least <= int(part[:9]) <= MOST_TOKENS:
            raise OptionError(f"{flag} is {text[:80]!r}: give whole numbers from {least} to {MOST_TOKENS}, as in 1,8.")
        numbers.append(int(part[:9]))
    return numbers
