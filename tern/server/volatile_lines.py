"""Lines that coding agents put before a system prompt, other ones with each request, and that mean nothing to a model.

A prefix cache finds nothing behind a line that changes, so such lines are left out. Knows text and no API.
"""

from __future__ import annotations

import re

VOLATILE = ("x-anthropic-billing-header:",)
"""How such lines begin. Claude Code's has a hash of the request: `...: cc_version=2.1.37.0d9; cch=fa690;`."""

_LINES = re.compile(rf"(?:(?:{'|'.join(map(re.escape, VOLATILE))})[^\n]*(?:\n+|\Z))+")


def without_volatile_lines(text: str) -> str:
    """The text without such lines at its beginning; elsewhere they are somebody's words."""
    lines = _LINES.match(text)
    return text[lines.end() :] if lines else text
