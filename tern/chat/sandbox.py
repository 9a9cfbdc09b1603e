"""Where a stranger's template runs: it reads immutable values, and time, memory and output are bounded.

Knows Jinja; knows no messages. A thread cannot be stopped from outside, so nothing that a template can say may take
long by itself. What loops looks at the clock. What makes a value out of others is measured before it is made: a few
lines can double a text, or a list of lists, until no machine holds it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_PROMPT_LENGTH = 64_000_000
"""Characters of one value and of the output: far above any model's context, far below the machine's memory."""
LARGE = 1_000_000
MAX_LARGE_TOTAL = 8 * MAX_PROMPT_LENGTH
"""Characters of all values of at least `LARGE` together: what fits a model's context is never counted."""
MAX_SECONDS = 10.0
MAX_NUMBER_BITS = 4096
"""How long a number a template may make."""

_SLOW_FILTERS = frozenset({"pprint", "striptags", "title", "urlize", "wordwrap", "xmlattr"})
"""They walk a text in Python or by regular expressions: at most `LARGE` characters go in."""
_PADDING = frozenset(
    {"batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "tojson", "truncate", "zfill"}
)
"""Their numbers are widths or counts of what they make."""
_STRUCTURAL = frozenset({"count", "default", "d", "first", "items", "last", "length",
        "list", "map", "reject", "rejectattr",
                         "select", "selectattr", "attr", "dictsort", "groupby", "sort", "unique", "min", "max",
                         "random", "reverse"})  # fmt: skip
"""They pass on or count what there is: its size need not be known."""
_FILTER, _LOOP = "tern_concat", "tern_clocked"
_WIDTH = re.compile(r"\d{5}|\*")


class Refused(jinja2.TemplateError):
    """The template asked for too much, or called `raise_exception`."""


@dataclass
class _Budget:
    """What a run of a template may still use."""

    deadline: float
    large: int = MAX_LARGE_TOTAL


_budget: ContextVar[_Budget] = ContextVar("tern_template_budget")


def bounded(pieces: Iterable[str]) -> Iterator[str]:
    """A template's output as it is written, stopped at the limits of length and time, which begin now."""
    _budget.set(_Budget(time.monotonic() + MAX_SECONDS))
    written = 0
    for piece in pieces:
        look_at_clock()
        written += len(piece)
        if written > MAX_PROMPT_LENGTH:
            raise Refused(f"it wrote more than {MAX_PROMPT_LENGTH} characters; send shorter messages")
        yield piece


def look_at_clock() -> None:
    """Raise `Refused` when the time is up."""
    budget = _budget.get(None)  # there is none while constants are computed, at compilation
    if budget is not None and time.monotonic() > budget.deadline:
        raise Refused(f"it ran longer than {MAX_SECONDS:g} seconds; send fewer or shorter messages")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja whose values cannot be changed, whose attributes do not lead into Python, and whose every operation is
    bounded. `filters` and `functions` are added to Jinja's own.
    """

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(
        self, filters: Mapping[str, Callable[..., Any]], functions: Mapping[str, Callable[..., Any]], **options: Any
    ) -> None:
        super().__init__(finalize=_checked_output, **options)
        del self.globals["lipsum"]  # it writes as long a text as it is asked for
        self.globals.update(functions)
        for name, function in {**self.filters, **filters}.items():
            self.filters[name] = _measured(name, function)
        self.filters.update({_FILTER: _concat, _LOOP: _clocked})

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a macro, a function or a method of a value."""
        look_at_clock()
        method = getattr(obj, "__wrapped__", obj)  # Jinja wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, int):
            raise Refused("it calls a method of a number")
        if isinstance(owner, str):
            _check_method(method.__name__, owner, args, kwargs)
        result = super().call(context, obj, *args, **kwargs)
        return _charge(result) if isinstance(owner, str) else result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The result of `left * right`, `left ** right`, `left % right` or `left + right`, unless it would be huge."""
        if operator == "%" and isinstance(left, str):
            _check_format(left, (right,))
        elif operator == "*":
            _check_product(left, right)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_NUMBER_BITS:
                raise Refused(f"it computes a power of more than {MAX_NUMBER_BITS} bits")
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _check_length(len(left) + len(right))
        return _charge(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Rewriter().visit(super()._parse(source, name, filename))
        return tree


class _Rewriter(NodeTransformer):
    """Leads loops and `~`, which Jinja compiles to plain Python, through filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """`for x in xs` becomes `for x in xs | clocked`."""
        node = self.generic_visit(node)  # type: ignore[assignment]
        node.iter = nodes.Filter(node.iter, _LOOP, [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`a ~ b ~ c` becomes `[a, b, c] | concat`."""
        node = self.generic_visit(node)  # type: ignore[assignment]
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, _FILTER, [], [], None, None, lineno=node.lineno)


def _clocked(items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, until the time is up."""
    for item in items:
        look_at_clock()
        yield item


def _concat(parts: list[Any]) -> str:
    _check_length(sum(map(_size, parts)))
    text: str = _charge("".join(map(str, parts)))
    return text


def _checked_output(value: Any) -> Any:
    """What `{{ value }}` is about to write, unless that would be huge."""
    if not isinstance(value, str | int | float | bool | None):
        _check_length(_size(value))
    return value


def _measured(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at the clock, at what goes in and at what comes out."""
    given = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or context goes first

    @wraps(function)  # keeps the mark by which Jinja knows that
    def measured(*args: Any, **kwargs: Any) -> Any:
        look_at_clock()
        value, rest = args[given], [*args[given + 1 :], *kwargs.values()]
        if name in _PADDING:
            _check_numbers(name, rest, lines=value if name == "indent" else None)
        if name == "sum" and rest and not all(isinstance(each, str | int | float | None) for each in rest):
            raise Refused("it sums what are no numbers")
        if name not in _STRUCTURAL:
            value = args[given] if isinstance(value, str) else _held(value)
            args = (*args[:given], value, *args[given + 1 :])
            _check_filter(name, value, rest)
        return _charge(function(*args, **kwargs))

    return measured


def _held(value: Any) -> Any:
    """An iterator as a list, so that it can be looked at twice."""
    return list(_clocked(value)) if isinstance(value, Iterator) else value


def _check_filter(name: str, value: Any, rest: list[Any]) -> None:
    size = _size(value)
    if name == "replace" and isinstance(value, str) and len(rest) > 1:
        size = _replaced(value, str(rest[0]), str(rest[1]))
    elif name == "join":
        size += (len(value) if hasattr(value, "__len__") else 1) * (_size(rest[0]) if rest else 0)
    elif name == "format" and isinstance(value, str):
        _check_format(value, rest)
    _check_length(size)
    if name in _SLOW_FILTERS and size > LARGE:
        raise Refused(f"it gives the filter {name} {size} characters: at most {LARGE} are read")


def _check_method(name: str, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a method of a text that would make something huge."""
    if name in ("translate", "encode"):
        raise Refused(f"it calls {name}, which no chat template needs")
    if name in _PADDING:
        numbers = [*args, *kwargs.values()] or [8]  # expandtabs without a number
        _check_numbers(name, numbers, tabs=text.count("\t") if name == "expandtabs" else 1)
    elif name in ("format", "format_map"):
        _check_format(text, [*args, *kwargs.values()])
    elif name == "join" and args:
        items = list(_clocked(args[0])) if not isinstance(args[0], str) else args[0]
        _check_length(sum(map(_size, items)) + len(items) * len(text))
    elif name == "replace" and len(args) > 1 and all(isinstance(each, str) for each in args[:2]):
        _check_length(_replaced(text, args[0], args[1]))


def _check_numbers(name: str, numbers: Iterable[Any], *, tabs: int = 1, lines: Any = None) -> None:
    times = lines.count("\n") + 1 if isinstance(lines, str) else tabs
    for number in numbers:
        if isinstance(number, int) and abs(number) * max(1, times) > LARGE:
            raise Refused(f"it calls {name} with {number}, a number that is too large")


def _replaced(text: str, old: str, new: str) -> int:
    """The length of a text when `old` has become `new` everywhere."""
    return len(text) + text.count(old) * max(0, len(new) - len(old))


def _check_format(form: str, args: Iterable[Any]) -> None:
    """Refuse a format that pads to a great width, or writes large values again and again."""
    if _WIDTH.search(form):
        raise Refused("it formats a value to a great width")
    places = form.count("%") + form.count("{")
    _check_length(len(form) + places * sum(map(_size, args)))


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_NUMBER_BITS:
            raise Refused(f"it computes a product of more than {MAX_NUMBER_BITS} bits")
        return
    for value, count in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(count, int) and len(value) * count > MAX_PROMPT_LENGTH:
            raise Refused(f"it repeats a value of length {len(value)} {count} times")


def _size(value: Any, known: dict[int, int] | None = None) -> int:
    """About how many characters a value is as text. A list that stands in another twice counts twice, but is walked
    through once.
    """
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 64
    known = {} if known is None else known
    if id(value) not in known:
        look_at_clock()
        known[id(value)] = 2  # a list cannot hold itself, but a stranger's value is asked once only
        items = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 2 + sum(_size(item, known) + 2 for item in items)
    return known[id(value)]


def _check_length(length: int) -> None:
    if length > MAX_PROMPT_LENGTH:
        raise Refused(f"it makes a value of {length} characters: at most {MAX_PROMPT_LENGTH} are made")


def _charge(value: Any) -> Any:
    """The value, once its size has been taken from the budget."""
    if isinstance(value, str | list | tuple) and len(value) >= LARGE and (budget := _budget.get(None)) is not None:
        budget.large -= len(value)
        if budget.large < 0:
            raise Refused(f"it makes values of more than {MAX_LARGE_TOTAL} characters together")
    return value
