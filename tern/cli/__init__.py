"""The command line: one file a subcommand. Knows options and terminals; heavy imports wait until a command runs."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import typer

from tern.cli import bench, chat, doctor, evaluate, generate, quantize, run_batch, serve
from tern.cli.flags import with_dashes, without_ignored
from tern.errors import InvalidRequestError, OptionError, TernError

__all__ = ["app", "main"]

WRONG_USAGE = 2

app = typer.Typer(
    name="tern",
    help="Runs ERNIE-4.5-21B-A3B-Thinking and its family. Where no model is named, the small embedded one is used.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("serve")(serve.serve)
app.command("chat")(chat.chat)
app.command("generate")(generate.generate)
app.command("run-batch")(run_batch.run_batch)
app.command("quantize")(quantize.quantize)
app.command("bench")(bench.bench)
app.command("eval")(evaluate.evaluate)
app.command("doctor")(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from tern import __version__

        typer.echo(f"tern {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options of every command."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that `argv` (the process's own arguments by default) names, and exit with its status.

    A `TernError` becomes one line on standard error: exit status 2 for wrong usage, 1 for what went wrong later.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows ? in its place
    try:
        arguments = with_dashes(sys.argv[1:] if argv is None else argv)
        if arguments[:1] in (["serve"], ["run-batch"]):
            arguments, ignored = without_ignored(arguments)
            if ignored:
                typer.echo(f"tern: {', '.join(ignored)}: accepted, and needs nothing done here.", err=True)
        app(args=arguments, prog_name="tern")
    except TernError as error:
        typer.echo(f"tern: {error}", err=True)
        sys.exit(WRONG_USAGE if isinstance(error, OptionError | InvalidRequestError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
