"""Writes `docs/cli.md` from the commands' own help, so that it cannot drift: `python -m tern.cli.help_pages FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

from typer.testing import CliRunner

from tern.cli import app

WIDTH = 100


def render() -> str:
    """The whole document: each command's `--help` at a fixed width, in the order of `tern --help`, and the rest."""
    names = [command.name for command in app.registered_commands]
    pages = ["# Command line\n\nGenerated from the commands' own help by `make docs`; a test compares.\n", _page([])]
    pages += [_page([name]) for name in names if name]
    pages.append(_page(["serve"], "--help-all"))
    return "\n".join(pages)


def _page(command: list[str], flag: str = "--help") -> str:
    # NO_COLOR and a fixed width make the text the same wherever it is generated.
    environment = {
        "TERMINAL_WIDTH": str(WIDTH),
        "COLUMNS": str(WIDTH),
        "NO_COLOR": "1",
        "TERN_API_KEY": "",
        "HF_TOKEN": "",
    }
    help_text = CliRunner(env=environment).invoke(app, [*command, flag], prog_name="tern").output
    lines = "\n".join(line.rstrip() for line in help_text.strip().splitlines())
    title = " ".join(["tern", *command, *([flag] if flag != "--help" else [])])
    return f"## `{title}`\n\n```text\n{lines}\n```\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
