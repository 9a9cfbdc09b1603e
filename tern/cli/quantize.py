"""`tern quantize`: a checkpoint packed in 4 or 8 bits, once, so that it can be mapped ever after."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from tern.errors import OptionError


def quantize(
    model: Annotated[str, typer.Argument(metavar="SRC", help="Directory, .gguf file, hub id or dummy:PRESET.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New directory for the packed checkpoint.")],
    bits: Annotated[int, typer.Option(help="4 or 8 bits a weight.")] = 4,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    hf_token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Token for private hub models.")] = None,
) -> None:
    """Write SRC to DST with its linear weights and experts packed in 4 or 8 bits.

    DST is served like any checkpoint, is mapped instead of copied, and takes a quarter or half of the memory. A run
    that was cut short goes on where it stopped.
    """
    if bits not in (4, 8):
        raise OptionError(f"--bits is {bits}: it must be 4 or 8.")
    from tern.checkpoint import quantise_checkpoint, resolve_model

    started = time.monotonic()
    source = resolve_model(model, revision=revision, token=hf_token)
    quantise_checkpoint(source, destination, bits)
    size = sum(path.stat().st_size for path in destination.iterdir()) / 1e9
    seconds = time.monotonic() - started
    typer.echo(f"{destination}: {size:.2f} GB in {seconds:.0f} s. Try it: tern chat {destination}", err=True)
