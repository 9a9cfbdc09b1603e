"""The rooms of the house and the one-way arrows between them, read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tern"

ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "ops": {"errors"},
    "model": {"ops", "errors"},
    "checkpoint": {"model", "ops", "embedded", "errors"},
    "embedded": set(),
    "engine": {"checkpoint", "model", "ops", "errors"},
    "bench": {"engine", "checkpoint", "model", "ops", "errors"},
    "chat": {"errors"},
    "server": {"engine", "chat", "errors"},
    "offline": {"engine", "chat", "errors"},
    "llm": {"offline", "engine", "checkpoint", "chat", "errors"},
    "evaluation": {"llm", "engine", "errors"},
    "transformers": {"llm", "engine", "checkpoint", "chat", "errors"},
    "cli": {"server", "llm", "bench", "evaluation", "engine", "checkpoint", "chat", "errors"},
    "entrypoints": {"cli"},
    "__main__": {"cli"},
    "": {"llm", "engine", "errors"},
}
"""What each room may import, besides itself; "" is tern/__init__.py."""

FORBIDDEN = {
    "chat": {"torch", "transformers", "fastapi", "uvicorn"},
    "server": {"torch", "transformers"},
    "engine": {"fastapi", "uvicorn", "transformers"},
    "model": {"transformers"},
    "checkpoint": {"transformers"},
}
NEVER = {"pickle", "cloudpickle", "marshal", "shelve"}


def room_of(path: Path) -> str:
    """The room a source file stands in: the first folder below tern/, or the module's own name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, anywhere in it, as (line, dotted name)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute in this house"
            module = node.module or ""
            yield node.lineno, module
            if module == "tern":
                yield from ((node.lineno, f"tern.{alias.name}") for alias in node.names)


def violations(path: Path) -> Iterator[str]:
    """Each import of a file that goes against the arrows."""
    room = room_of(path)
    for line, name in imports_of(path):
        head, _, rest = name.partition(".")
        if head == "tern" and rest:
            target = rest.split(".")[0]
            if target != room and target in ARROWS and target not in ARROWS[room]:
                yield f"{path}:{line}: {room or 'tern'} may not import {target}"
        if head in FORBIDDEN.get(room, set()) | NEVER:
            yield f"{path}:{line}: {room or 'tern'} may not import {head}"


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_is_known() -> None:
    assert {room_of(path) for path in SOURCES} <= ARROWS.keys()


def test_the_arrows_hold() -> None:
    assert [found for path in SOURCES for found in violations(path)] == []


def test_the_arrows_are_acyclic() -> None:
    def reaches(start: str, goal: str) -> bool:
        return goal in ARROWS[start] or any(reaches(room, goal) for room in ARROWS[start])

    assert [room for room in ARROWS if reaches(room, room)] == []


def test_a_wrong_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "chat").mkdir()
    wrong = tmp_path / "chat" / "wrong.py"
    wrong.write_text("def late():\n    import torch\n    from tern import engine\n")
    assert len(list(violations(wrong))) == 2


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("tern.cli", "torch"),
        ("tern.chat", "torch"),
        ("tern.engine.scheduler", "torch"),
        ("tern.engine.block_pool", "torch"),
        ("tern", "torch"),
        ("tern.llm", "transformers"),
    ],
)
def test_importing_stays_light(module: str, unwanted: str) -> None:
    code = f"import sys, {module}; sys.exit(1 if {unwanted!r} in sys.modules else 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr or f"{module} imports {unwanted}"
