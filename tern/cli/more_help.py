"""`--help-all`: a command's help with the options that `--help` leaves out, so that the usual ones fit a screen."""

from __future__ import annotations

import typer


def _show(context: typer.Context, wanted: bool) -> None:
    if not wanted:
        return
    for parameter in context.command.params:
        if getattr(parameter, "help", None):  # one without a word about it is only there to be refused
            parameter.hidden = False  # type: ignore[attr-defined]
    typer.echo(context.get_help())
    raise typer.Exit


MORE_HELP = typer.Option("--help-all", is_eager=True, callback=_show, help="Show the rarer options too, and exit.")
