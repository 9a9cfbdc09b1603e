"""Gathers what is wrong with a checkpoint, so that one error can list all of it. Knows no files and no tensors."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import NoReturn

from tern.errors import CheckpointError

SHOWN_PER_KIND = 20
SHOWN_LENGTH = 400
"""Characters of a finding: names come from the files and may be of any length and kind."""


class Problems:
    """Findings grouped by kind (`"missing"`, `"misshapen"`, ...), each a clause that names what is wrong."""

    def __init__(self) -> None:
        self._by_kind: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, finding: str) -> None:
        """Note one finding; kinds are listed in the order in which they first appear."""
        self._by_kind[kind].append(finding)

    def __bool__(self) -> bool:
        return bool(self._by_kind)

    def lines(self) -> list[str]:
        """The findings, at most `SHOWN_PER_KIND` of each kind and then a count of the rest."""
        lines = []
        for kind, findings in self._by_kind.items():
            lines += [f"{kind}: {_shown(finding)}" for finding in findings[:SHOWN_PER_KIND]]
            if len(findings) > SHOWN_PER_KIND:
                lines.append(f"{kind}: and {len(findings) - SHOWN_PER_KIND} more")
        return lines

    def fail(self, directory: Path) -> NoReturn:
        """Raise the one `CheckpointError` that lists the findings."""
        count = sum(map(len, self._by_kind.values()))
        found = "1 problem was" if count == 1 else f"{count} problems were"
        raise CheckpointError(f"The checkpoint {directory} cannot be loaded; {found} found:", problems=self.lines())


def _shown(finding: str) -> str:
    """A finding, shortened, with what a terminal would obey or not show spelt out."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in finding[:SHOWN_LENGTH])
    return shown + "..." * (len(finding) > SHOWN_LENGTH)
