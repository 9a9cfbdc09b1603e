"""`python -m tern.entrypoints.openai.api_server --model M ...`: FastDeploy's command; the same as `tern serve`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Serve with these arguments, the process's own by default."""
    from tern.cli import main as command_line

    command_line(["serve", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
