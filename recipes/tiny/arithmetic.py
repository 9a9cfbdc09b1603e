"""Sums, differences and two-digit products with the column method written out.

Held out by construction: a problem whose checksum falls in one tenth of all is never trained on.
"""

from __future__ import annotations

import random

from recipes.tiny.conversation import Example, Language, Turn, user
from recipes.tiny.words import is_held_out

PLACES = {"en": ("ones", "tens", "hundreds", "thousands"), "zh": ("个位", "十位", "百位", "千位")}

QUESTIONS = {
    ("en", "+"): (
        "What is {a} + {b}?",
        "{a}+{b}",
        "{a} + {b} = ?",
        "{a} + {b}",
        "Calculate {a} plus {b}.",
        "Add {a} and {b}.",
        "how much is {a} plus {b}",
        "What's {a} + {b}?",
        "Please compute {a}+{b}.",
        "What is the sum of {a} and {b}?",
    ),
    ("en", "-"): (
        "What is {a} - {b}?",
        "{a}-{b}",
        "{a} - {b} = ?",
        "{a} - {b}",
        "Calculate {a} minus {b}.",
        "Subtract {b} from {a}.",
        "how much is {a} minus {b}",
        "What's {a} - {b}?",
        "Please compute {a}-{b}.",
        "What is the difference {a} - {b}?",
    ),
    ("en", "×"): (
        "What is {a} × {b}?",
        "{a}*{b}",
        "{a} x {b} = ?",
        "{a} × {b}",
        "Calculate {a} times {b}.",
        "Multiply {a} by {b}.",
        "how much is {a} times {b}",
        "What's {a} * {b}?",
        "Please compute {a}×{b}.",
        "What is the product of {a} and {b}?",
    ),
    ("zh", "+"): (
        "{a}加{b}等于多少？",
        "{a}+{b}",
        "{a}+{b}=?",
        "计算{a}+{b}",
        "请问{a}+{b}是多少？",
        "{a}和{b}的和是多少？",
        "帮我算一下{a}加{b}",
        "{a} + {b} 等于几？",
    ),
    ("zh", "-"): (
        "{a}减{b}等于多少？",
        "{a}-{b}=？",
        "{a}-{b}=?",
        "计算{a}-{b}",
        "请问{a}-{b}是多少？",
        "{a}减去{b}是多少？",
        "帮我算一下{a}减{b}",
        "{a} - {b} 等于几？",
    ),
    ("zh", "×"): (
        "{a}乘以{b}等于多少？",
        "{a}×{b}=？",
        "{a}*{b}等于多少",
        "计算{a}×{b}",
        "请问{a}×{b}是多少？",
        "{a}和{b}的积是多少？",
        "帮我算一下{a}乘{b}",
        "{a} × {b} 等于几？",
    ),
}
ASCII_ONLY = frozenset({"{a}+{b}", "{a} + {b}", "{a}-{b}", "{a} - {b}", "{a}*{b}"})
"""Questions without a word of any language; they are answered in English."""


def columns_of_sum(a: int, b: int, language: Language, width: int) -> list[str]:
    """One line per decimal place, ones first, each with the carry from the line before."""
    lines, carry = [], 0
    for place in PLACES[language][:width]:
        x, y = a % 10, b % 10
        total = x + y + carry
        line = f"{x}+{y}+{carry}={total}"
        carry = total // 10
        lines.append(f"{place}: {line}, carry {carry}" if language == "en" else f"{place}：{line}，进{carry}")
        a, b = a // 10, b // 10
    return lines


def columns_of_difference(a: int, b: int, language: Language, width: int) -> list[str]:
    """As `columns_of_sum`, for a >= b, with borrowing."""
    lines, borrow = [], 0
    for place in PLACES[language][:width]:
        x, y = a % 10, b % 10
        lend = 10 if x - y - borrow < 0 else 0
        line = f"{x + lend}-{y}-{borrow}={x + lend - y - borrow}"
        borrow = lend // 10
        lines.append(f"{place}: {line}, borrow {borrow}" if language == "en" else f"{place}：{line}，借{borrow}")
        a, b = a // 10, b // 10
    return lines


def think_sum(a: int, b: int, language: Language) -> str:
    """The thought for a + b."""
    width = max(len(str(a)), len(str(b)))
    lines = [f"{a:0{width}d} + {b:0{width}d}", *columns_of_sum(a, b, language, width)]
    return "\n".join([*lines, f"= {a + b}"])


def think_difference(a: int, b: int, language: Language) -> str:
    """The thought for a - b, of either sign."""
    width = max(len(str(a)), len(str(b)))
    large, small = max(a, b), min(a, b)
    sign = "<" if a < b else ">="
    lines = [f"{a:0{width}d} {sign} {b:0{width}d}", f"{large:0{width}d} - {small:0{width}d}"]
    lines += columns_of_difference(large, small, language, width)
    return "\n".join([*lines, f"= {large - small:0{width}d}", f"= {a - b}"])


def times_digit(a: int, digit: int, language: Language) -> str:
    """Two-digit a times one digit, by digits with the carry: ``47×6: 7×6+0=42, carry 4; 4×6+4=28; 282``."""
    low = a % 10 * digit
    high = a // 10 * digit + low // 10
    carry = f", carry {low // 10}; " if language == "en" else f"，进{low // 10}；"
    end = "; " if language == "en" else "；"
    return f"{a:02d}×{digit}: {a % 10}×{digit}+0={low}{carry}{a // 10}×{digit}+{low // 10}={high}{end}{a * digit}"


def think_product(a: int, b: int, language: Language) -> str:
    """The thought for a × b, both below 100: two partial products and their sum."""
    low, high = a * (b % 10), a * (b // 10) * 10
    lines = [f"{a:02d} × {b:02d}", times_digit(a, b % 10, language), times_digit(a, b // 10, language)]
    return "\n".join([*lines, f"{low:04d} + {high:04d}", *columns_of_sum(low, high, language, 4), f"= {a * b}"])


def solve(a: int, operator: str, b: int, language: Language) -> Turn:
    """The assistant's turn for one problem."""
    think = {"+": think_sum, "-": think_difference, "×": think_product}[operator]
    value = {"+": a + b, "-": a - b, "×": a * b}[operator]
    stop = "." if language == "en" else "。"
    return Turn(think(a, b, language), f"{a} {operator} {b} = {value}{stop}")


def operand(rng: random.Random, digits: int) -> int:
    """A number of one to `digits` digits, longer ones more often."""
    size = rng.choices(range(1, digits + 1), weights=range(1, digits + 1))[0]
    return rng.randrange(10 ** (size - 1) if size > 1 else 0, 10**size)


def problem(rng: random.Random, operator: str, held_out: bool) -> tuple[int, int]:
    """Two operands on the wanted side of the split."""
    while True:
        digits = 2 if operator == "×" else 4
        a, b = operand(rng, digits), operand(rng, digits)
        if operator == "×" and held_out and min(a, b) < 10:
            continue
        if is_held_out(f"{a}{operator}{b}") == held_out:
            return a, b


def example(rng: random.Random, language: Language, held_out: bool, operator: str | None = None) -> Example:
    """A question for a sum, a difference or a product."""
    operator = operator or rng.choice("+-×")
    a, b = problem(rng, operator, held_out)
    question = rng.choice(QUESTIONS[language, operator])
    answer_in: Language = "en" if question in ASCII_ONLY else language
    skill = "product" if operator == "×" else "sum"
    return Example(skill, language, [user(question.format(a=a, b=b))], solve(a, operator, b, answer_in))
