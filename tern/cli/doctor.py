"""`tern doctor`: what machine this is, which kernels will run, and what of a model fits, before anything is loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tern.bench import Diagnosis
    from tern.bench.doctor import MachineReport


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Directory, .gguf file, hub id or dummy:PRESET.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
) -> None:
    """Say what machine this is, which kernels will run, and whether MODEL fits, in which precision and context.

    Of a hub model only the description is downloaded.
    """
    from tern.bench import diagnose
    from tern.checkpoint import resolve_model

    found = diagnose(None if model is None else resolve_model(model, revision=revision, weights=False))
    if as_json:
        typer.echo(json.dumps(found.as_json()))
        return
    _print_machine(found.machine)
    if found.model is not None:
        _print_model(found)


def _print_machine(machine: MachineReport) -> None:
    typer.echo(f"processor  {machine.processor}, {machine.processors} usable, {machine.threads} threads")
    if machine.flags:
        typer.echo(f"           {' '.join(machine.flags)}")
    others = ", ".join(name for name in machine.available if name != machine.isa)
    typer.echo(f"kernels    {machine.isa} (also here: {others})" if others else f"kernels    {machine.isa}")
    for gpu in machine.gpus:
        memory = f"{gpu.free_gb:.1f} GB free of {gpu.memory_gb:.1f}"
        typer.echo(f"GPU        {gpu.name}, compute capability {gpu.capability}, {memory}")
    if not machine.gpus:
        typer.echo("GPU        none that torch can use")
    for problem in machine.gpu_problems:
        typer.echo(f"           {problem}")
    if machine.gpus:
        found = " and ".join(f"{name} {number}" for name, number in machine.attention.items())
        typer.echo(f"attention  {found}, for prompts that it can attend" if found else "attention  Tern's own kernels")
    limit = "" if machine.memory_limit_gb is None else f", this control group may use {machine.memory_limit_gb:.1f}"
    typer.echo(f"memory     {machine.free_gb:.1f} GB free of {machine.memory_gb:.1f}{limit}")
    typer.echo(f"disk       {machine.disk_free_gb:.1f} GB free for downloads, {machine.downloads}")
    free = " and ".join(map(str, machine.free_ports)) or "neither"
    typer.echo(f"ports      {free} free of tern serve's 8000 and make serve's 8180")
    typer.echo(f"software   {', '.join(f'{name} {number}' for name, number in machine.versions.items())}")


def _print_model(found: Diagnosis) -> None:
    typer.echo(f"\n{found.model}, {found.max_positions} positions")
    if found.download_gb is not None:
        short = found.download_gb > found.machine.disk_free_gb
        room = f", but only {found.machine.disk_free_gb:.1f} are free: set HF_HOME to a larger disk" if short else ""
        typer.echo(f"download   {found.download_gb:.1f} GB in bfloat16{room}")
    for fit in found.fits:
        verdict = f"fits with a context of {fit.longest_context} tokens" if fit.fits else "does not fit"
        mark = " (unless told otherwise)" if fit.precision == found.default and len(found.fits) > 1 else ""
        beside = f" and {fit.host_gb:.1f} GB in the host's memory" if fit.host_gb else ""
        typer.echo(
            f"{fit.device:7} {fit.precision:9} {fit.weights_gb:6.1f} GB of weights{beside}, "
            f"{fit.kv_gb_per_1000_tokens:.3f} GB of cache for 1000 tokens: {verdict}{mark}"
        )
    if found.residence is not None:
        typer.echo(f"--device auto: {found.residence}")
    typer.echo(f"try        {found.advice}" if found.advice else "Nothing fits: use a smaller model or more memory.")
