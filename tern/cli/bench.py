"""`tern bench`: the speed of prefill and decode steps as shares of this machine's limits, or a running server's."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tern.cli.bench_load import bench_server, check_rates
from tern.errors import OptionError

if TYPE_CHECKING:
    from tern.bench import BenchReport, BenchResult
    from tern.bench.draw import Destination

MOST_TOKENS = 2**20
MOST_SEQUENCES = 4096
STEP_FLAGS = ("quantization", "kv_cache_dtype", "prefill", "decode", "depth", "device", "revision")
LOAD_FLAGS = ("rates", "requests", "prompt_tokens", "output_tokens", "concurrency", "endpoint", "api_key", "seed")


def bench(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Directory, .gguf file, hub id or dummy:PRESET; with --url its name.")
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="wint4, wint8, on a GPU fp8; none: floats.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, bfloat16, int8 (CPU) or fp8 (GPU).")] = "auto",
    prefill: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "512",
    decode: Annotated[str, typer.Option(help="Numbers of sequences that decode together.")] = "1",
    depth: Annotated[str, typer.Option(help="Tokens that are in the cache already.")] = "0",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    url: Annotated[str | None, typer.Option(help="Load this OpenAI-compatible server instead.")] = None,
    rates: Annotated[str, typer.Option(help="Requests arriving a second; inf: all at once.")] = "inf",
    requests: Annotated[int, typer.Option(help="Requests of each rate.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt, about.")] = 512,
    output_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    concurrency: Annotated[int | None, typer.Option(help="Most requests open at once; default: any.")] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    api_key: Annotated[str | None, typer.Option(envvar="TERN_API_KEY", help="The server's key.")] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and words.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
    report: Annotated[str | None, typer.Option(help="Draw to FILE.svg, FILE.png or a directory.")] = None,
) -> None:
    """Time a model's prefill and decode steps, each as a share of what this machine could do at most.

    With --url, send a running server requests of random words that arrive at random, and say how long they take.
    """
    _refuse_foreign_flags(context, LOAD_FLAGS if url is None else STEP_FLAGS, loading=url is not None)
    command = ["tern", "bench", *_arguments()]
    if url is not None:
        from tern.bench.load import LoadPlan

        plan = LoadPlan(
            url=url,
            model=model,
            endpoint=endpoint,
            api_key=api_key,
            rates=check_rates(rates),
            requests=requests,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            concurrency=concurrency,
            seed=seed,
        )
        bench_server(plan, _destination(report), command, as_json=as_json)
        return
    lengths = _numbers("--prefill", prefill, 1, MOST_TOKENS)
    sequences = _numbers("--decode", decode, 1, MOST_SEQUENCES)
    depths = _numbers("--depth", depth, 0, MOST_TOKENS) or [0]
    destination = _destination(report)

    from tern.bench import run_bench
    from tern.checkpoint import resolve_model

    measured = run_bench(
        resolve_model(model, revision=revision),
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        prefill=lengths,
        decode=sequences,
        depths=depths,
        device=device,
        command=command,
        on_result=(lambda _: None) if as_json else _print,
    )
    _print_report(measured, as_json=as_json)
    if destination is not None:
        from tern.bench.draw_steps import steps_figure

        written = destination.write(lambda: steps_figure(measured), measured.as_json())
        typer.echo(f"Wrote {', '.join(map(str, written))}.", err=True)


def _print(result: BenchResult) -> None:
    what = f"{result.tokens} tokens" if result.kind == "prefill" else f"{result.sequences} sequences"
    overhead = "" if result.overhead_share is None else f", {result.overhead_share:.1%} outside the network"
    typer.echo(
        f"{result.kind:7}  {what:>14}  depth {result.depth:>6}  {result.tokens_per_s:9.1f} tokens/s  "
        f"{result.limit_share:4.0%} of the limit{overhead}"
    )


def _print_report(report: BenchReport, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.as_json()))
        return
    gpu = "" if report.peak_gpu_gb is None else f" and {report.peak_gpu_gb:.1f} of the GPU's"
    typer.echo(
        f"{report.machine.words}; loaded in {report.load_s:.1f} s, at most {report.peak_rss_gb:.1f} GB of memory{gpu}."
    )


def _destination(report: str | None) -> Destination | None:
    """Where the pictures go, known to be writable before anything is measured."""
    if report is None:
        return None
    from tern.bench.draw import Destination

    return Destination.of(report)


def _refuse_foreign_flags(context: typer.Context, names: tuple[str, ...], *, loading: bool) -> None:
    """Refuse flags that were typed and would do nothing."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = "--" + name.replace("_", "-")
            other = "times a model here, and --url loads a server: leave one out" if loading else "needs --url"
            raise OptionError(f"{flag} {other}.")


def _arguments() -> list[str]:
    """What was typed after `tern bench`, for the report."""
    return sys.argv[2:] if sys.argv[1:2] == ["bench"] else []


def _numbers(flag: str, text: str, least: int, most: int) -> list[int]:
    """A list such as `512,2048`; empty text is no number."""
    numbers = []
    for part in filter(None, map(str.strip, text.split(","))):
        if not (part.isascii() and part.isdigit()) or not least <= int(part[:9]) <= most:
            raise OptionError(f"{flag} is {text[:80]!r}: give whole numbers from {least} to {most}, as in 1,8.")
        numbers.append(int(part[:9]))
    return numbers
