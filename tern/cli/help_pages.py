"""Writes `docs/cli.md` from the commands' own help, so that the document cannot drift: `python -m tern.cli.help_pages FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import typer

from tern.cli import app

WIDTH = 100


def render() -> str:
    """The whole document: each command's `--help` at a fixed width, in the order of `tern --help`."""
    root = typer.main.get_command(app)
    assert isinstance(root, click.Group)
    pages = ["# Command line\n\nGenerated from the commands' own help by `make docs`; a test compares.\n"]
    pages += [_page("tern", root, None)]
    with click.Context(root, info_name="tern") as parent:
        pages += [_page(f"tern {name}", root.commands[name], parent) for name in root.list_commands(parent)]
    return "\n".join(pages)


def _page(title: str, command: click.Command, parent: click.Context | None) -> str:
    name = title.rsplit(" ", 1)[-1]
    context = click.Context(command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH)
    lines = [line.rstrip() for line in command.get_help(context).splitlines()]
    return f"## `{title}`\n\n```text\n" + "\n".join(lines) + "\n```\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
