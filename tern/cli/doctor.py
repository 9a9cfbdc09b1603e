"""`tern doctor`: what machine this is, which kernels will run, and what of a model fits, before anything is loaded."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Directory, .gguf file, hub id or dummy:PRESET.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
) -> None:
    """Say what machine this is, which kernels will run, and whether MODEL fits, in which precision and context."""
    from tern.bench import diagnose
    from tern.checkpoint import resolve_model

    found = diagnose(None if model is None else resolve_model(model, revision=revision))
    if as_json:
        typer.echo(json.dumps(found.as_json()))
        return
    machine = found.machine
    typer.echo(f"processor  {machine.processor}, {machine.processors} usable, {machine.threads} threads")
    others = ", ".join(name for name in machine.available if name != machine.isa)
    typer.echo(f"kernels    {machine.isa} (also here: {others})" if others else f"kernels    {machine.isa}")
    typer.echo(f"memory     {machine.free_gb:.1f} GB free of {machine.memory_gb:.1f}")
    typer.echo(f"software   Python {machine.python}, torch {machine.torch}")
    if found.model is None:
        return
    typer.echo(f"\n{found.model}, {found.max_positions} positions")
    for fit in found.fits:
        verdict = f"fits with a context of {fit.longest_context} tokens" if fit.fits else "does not fit"
        mark = " (unless told otherwise)" if fit.precision == found.default and len(found.fits) > 1 else ""
        typer.echo(
            f"{fit.precision:9}  {fit.weights_gb:5.1f} GB of weights, {fit.kv_gb_per_1000_tokens:.3f} GB of cache for "
            f"1000 tokens: {verdict}{mark}"
        )
