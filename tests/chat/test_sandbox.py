"""What a hostile template may not do: every way to a huge value or an endless run ends in a sentence, at once."""

from __future__ import annotations

import resource

import pytest

from tern.chat import ChatTemplate, sandbox
from tern.errors import InvalidRequestError

USER = [{"role": "user", "content": "hi"}]
BIG = "{% set big = 'x' * 60000000 %}"
DOUBLE = "{{% set ns = namespace(v={start}) %}}{{% for _ in range(60) %}}{{% set ns.v = {double} %}}{{% endfor %}}{end}"


def doubled(start: str, double: str, end: str = "{{ ns.v | length }}") -> str:
    return DOUBLE.format(start=start, double=double, end=end)


BOMBS = {
    "center": "{{ ('x' | center(2000000)) | length }}",
    "ljust": "{{ 'x'.ljust(2000000) | length }}",
    "zfill": "{{ 'x'.zfill(width=2000000) | length }}",
    "expandtabs": "{{ ('\\t' * 100000).expandtabs(5000) | length }}",
    "indent": "{{ (('a\\n' * 100000) | indent(5000)) | length }}",
    "tojson-indent": "{{ messages | tojson(indent=2000000) | length }}",
    "slice": "{{ 'abc' | slice(5000000) | list | length }}",
    "batch": "{{ 'abc' | batch(5000000, 'x') | list | length }}",
    "replace-filter": BIG + "{{ big | replace('x', big) | length }}",
    "replace-method": BIG + "{{ big.replace('x', big) | length }}",
    "join-filter": BIG + "{{ ([big] * 1000) | join | length }}",
    "join-separator": BIG + "{{ ('abc' * 1000) | join(big) | length }}",
    "join-method": BIG + "{{ big.join(['a'] * 1000) | length }}",
    "join-of-a-map": BIG + "{{ range(1000) | map('replace', '', big) | join | length }}",
    "format-filter": BIG + "{{ ('%s' * 1000) | format(big) | length }}",
    "format-method": BIG + "{{ ('{0}' * 1000).format(big) | length }}",
    "format-width": "{{ '{:>99999999}'.format(1) | length }}",
    "percent": BIG + "{{ ('%(a)s' * 1000) % {'a': big} }}",
    "concat": doubled("'ab'", "ns.v ~ ns.v"),
    "plus": doubled("'ab'", "ns.v + ns.v"),
    "plus-lists": doubled("[1, 2]", "ns.v + ns.v"),
    "times": doubled("'ab'", "ns.v * 2"),
    "numbers": doubled("99", "ns.v * ns.v", "{{ ns.v }}"),
    "nested-output": doubled("[1]", "[ns.v, ns.v]", "{{ ns.v }}"),
    "nested-json": doubled("[1]", "[ns.v, ns.v]", "{{ ns.v | tojson }}"),
    "nested-string": doubled("[1]", "{'a': ns.v, 'b': ns.v}", "{{ ns.v | string }}"),
    "nested-concat": doubled("[1]", "[ns.v, ns.v]", "{{ 'a' ~ ns.v }}"),
    "nested-pprint": doubled("[1]", "[ns.v, ns.v]", "{{ ns.v | pprint }}"),
    "sum-of-lists": "{{ ([['a'] * 1000] * 1000) | sum(start=[]) | length }}",
    "wordwrap": "{{ ('ab ' * 5000000) | wordwrap | length }}",
    "urlize": "{{ ('a.b ' * 5000000) | urlize | length }}",
    "translate": "{{ 'aaa'.translate({97: 'b'}) }}",
    "to-bytes": "{{ (5).to_bytes(1000000000, 'big') | length }}",
    "many-large-values": "{% set ns = namespace(l=[]) %}{% for i in range(99) %}{% set ns.l = ns.l + ['x' * 9999999] %}"
    "{% endfor %}",
    "lipsum": "{{ lipsum(n=1000000) }}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_nothing_huge_is_made(source: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRequestError, match="The chat template"):
        ChatTemplate(source).render(USER)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert grown < 1.5, "GiB more than before"


@pytest.mark.parametrize(
    "source",
    [
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{% set z = m(40) %}",
        "{% for a in range(99999) %}{{ range(99999) | map('string') | join | length }}{% endfor %}",
        "{% for a in range(99999) %}{{ messages | selectattr('role') | list | length }}{% endfor %}",
    ],
)
def test_nothing_runs_for_ever(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.05)
    with pytest.raises(InvalidRequestError, match=r"The chat template .*0\.05 seconds"):
        ChatTemplate(source).render(USER)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'a' ~ 5 ~ none ~ nothing ~ [1] }}", "a5None[1]"),
        ("{{ ['a', 'b'] | join(', ') }}{{ ', '.join(['a', 'b']) }}", "a, ba, b"),
        ("{{ 'aba' | replace('a', 'cc') }}{{ 'aba'.replace('a', '') }}", "ccbccb"),
        ("{{ 'x' | center(5) }}|{{ 'x'.ljust(3) }}|{{ 'a\\tb'.expandtabs(4) }}", "  x  |x  |a   b"),
        ("{{ '%s-%d' | format('a', 5) }}{{ '{}:{b}'.format(1, b=2) }}{{ '%s' % 'x' }}", "a-51:2x"),
        ("{{ [1, 2] + [3] }}{{ 'a' + 'b' }}{{ 2 + 3 }}{{ [1.5, 2] | sum }}", "[1, 2, 3]ab53.5"),
        ("{{ messages | map(attribute='role') | join }}{{ messages | tojson | length > 5 }}", "userTrue"),
        ("{% set x = 'a\\nb' | indent(2) %}{{ x }}{{ 'a b'.split() }}{{ 'Ab'.lower() }}", "a\n  b['a', 'b']ab"),
        ("{{ 'a b c' | wordwrap(3) }}{{ 'abc' | title }}{{ 'abc' | list }}", "a b\ncAbc['a', 'b', 'c']"),
        ("{{ ('a,b'.split(',') | last) ~ (messages[0].content if messages else '') }}", "bhi"),
    ],
)
def test_what_templates_do_every_day_still_works(source: str, text: str) -> None:
    assert ChatTemplate(source).render(USER) == text


def test_a_long_conversation_is_read_in_a_moment() -> None:
    """Measuring must not cost more than rendering: a template that builds its text piece by piece, and counts."""
    source = (
        "{% set ns = namespace(text='') %}{% for m in messages %}"
        "{% set ns.text = ns.text ~ m.role ~ ': ' ~ (m.content | trim) ~ '\\n' %}"
        "{% if loop.index0 == messages | length - 1 %}{{ ns.text }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "word " * 20}] * 5000
    assert ChatTemplate(source).render(messages).count("\n") == 5000
