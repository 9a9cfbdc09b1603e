"""How an answer looks on a terminal: the thought dimmed, the answer plain, tool calls marked. Knows no engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.text import Text

from tern.chat import ContentDelta, ReasoningDelta, ResponseEvent, ToolCallDelta


class AnswerPrinter:
    """Prints events as they come: the thought to `thoughts` (None hides it), everything else to `answers`.

    Colours appear only where the stream is a terminal.
    """

    def __init__(self, answers: TextIO, thoughts: TextIO | None) -> None:
        self._answers = Console(file=answers, highlight=False, markup=False, soft_wrap=True)
        self._thoughts = Console(file=thoughts, highlight=False, markup=False, soft_wrap=True) if thoughts else None
        self._section = ""

    def __call__(self, events: Sequence[ResponseEvent]) -> None:
        for event in events:
            match event:
                case ReasoningDelta(text):
                    self._write(self._thoughts, "thought", text, style="dim")
                case ContentDelta(text):
                    self._write(self._answers, "answer", text)
                case ToolCallDelta(index=index, name=name, arguments=arguments):
                    opening = f"-> {name} " if name else ""
                    self._write(self._answers, f"call {index}", opening + arguments, style="cyan")

    def end(self) -> None:
        """Close the last line."""
        if self._section:
            self._newline()
        self._section = ""

    def _write(self, console: Console | None, section: str, text: str, *, style: str = "") -> None:
        if console is None or not text:
            return
        if self._section and self._section != section:
            self._newline()
        self._section = section
        console.print(Text(text, style=style), end="")
        console.file.flush()

    def _newline(self) -> None:
        console = self._thoughts if self._section == "thought" and self._thoughts else self._answers
        console.print()
