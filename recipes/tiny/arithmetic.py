"""Sums, differences and two-digit products with the column method written out.

Held out by construction: a problem whose checksum falls in one tenth of all is never trained on.
"""

from __future__ import annotations

import random

from recipes.tiny.conversation import Example, Language, Turn, user
from recipes.tiny.words import is_held_out

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
        "What is {a} plus {b}?",
        "{a} plus {b}",
        "Compute {a} + {b}.",
        "Calculate {a} + {b}",
        "Solve {a} + {b}",
        "{a}+{b}=",
        "Can you add {b} to {a}?",
        "What do you get if you add {a} and {b}?",
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
        "What is {a} minus {b}?",
        "{a} minus {b}",
        "Compute {a} - {b}.",
        "Calculate {a} - {b}",
        "Solve {a} - {b}",
        "{a}-{b}=",
        "Can you subtract {b} from {a}?",
        "Take {b} away from {a}.",
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
        "What is {a} times {b}?",
        "{a} times {b}",
        "Compute {a} * {b}.",
        "Calculate {a} × {b}",
        "Solve {a} * {b}",
        "{a}*{b}=",
        "What is {a} multiplied by {b}?",
        "What is {a} * {b}?",
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
        "{a}加上{b}是多少",
        "计算 {a} + {b}",
        "求{a}与{b}的和",
        "{a}+{b}等于多少？",
        "{a} 加 {b} 等于多少？",
        "请计算{a}+{b}。",
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
        "{a}减去{b}等于多少",
        "计算 {a} - {b}",
        "求{a}与{b}的差",
        "{a}-{b}等于多少？",
        "{a} 减 {b} 等于多少？",
        "请计算{a}-{b}。",
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
        "{a}乘{b}是多少",
        "计算 {a} × {b}",
        "求{a}与{b}的积",
        "{a}×{b}等于多少？",
        "{a} 乘以 {b} 等于多少？",
        "请计算{a}×{b}。",
    ),
}


def columns_of_sum(a: int, b: int) -> list[str]:
    """One line per decimal place, ones first: what is left to add with the carry, its last digits, the result so far.

    Each line follows from the one above it and from nothing else: ``478+95+1: 8+5+1=14 -> 41``.
    """
    lines, carry, done = [], 0, ""
    while True:
        total = a % 10 + b % 10 + carry
        last = a < 10 and b < 10
        done = (str(total) if last else str(total % 10)) + done
        lines.append(f"{a}+{b}+{carry}: {a % 10}+{b % 10}+{carry}={total} -> {done}")
        if last:
            return lines
        a, b, carry = a // 10, b // 10, total // 10


def columns_of_difference(a: int, b: int) -> list[str]:
    """As `columns_of_sum`, for a >= b, with borrowing: ``478-95-1: 18-5-1=12 -> 21``.

    Ten is added to every digit; a result of ten or more did not need it.
    """
    lines, borrow, done = [], 0, ""
    while True:
        left = a % 10 + 10 - b % 10 - borrow
        done = str(left % 10) + done
        lines.append(f"{a}-{b}-{borrow}: 1{a % 10}-{b % 10}-{borrow}={left} -> {done}")
        if a < 10 and b < 10:
            return lines
        a, b, borrow = a // 10, b // 10, 1 - left // 10


def think_sum(a: int, b: int) -> str:
    """The thought for a + b."""
    return "\n".join([*columns_of_sum(a, b), f"= {a + b}"])


def think_difference(a: int, b: int) -> str:
    """The thought for a - b, of either sign."""
    large, small = max(a, b), min(a, b)
    sign = "<" if a < b else ">="
    return "\n".join([f"{a} {sign} {b}", *columns_of_difference(large, small), f"= {a - b}"])


def times_digit(a: int, digit: int) -> str:
    """Two-digit a times one digit, by digits with the carry: ``47*6: 7*6=42, 4*6=24, 24+4=28 -> 282``."""
    low, high = a % 10 * digit, a // 10 * digit
    carry = low // 10
    steps = f"{a % 10}*{digit}={low}, {a // 10}*{digit}={high}, {high}+{carry}={high + carry}"
    return f"{a}*{digit}: {steps} -> {a * digit}"


def think_product(a: int, b: int) -> str:
    """The thought for a × b, both below 100: two partial products and their sum."""
    high, low = divmod(b, 10)
    lines = [f"{a}*{b}", times_digit(a, high), times_digit(a, low)]
    return "\n".join([*lines, *columns_of_sum(a * high * 10, a * low), f"= {a * b}"])


def solve(a: int, operator: str, b: int, language: Language) -> Turn:
    """The assistant's turn for one problem."""
    think = {"+": think_sum, "-": think_difference, "×": think_product}[operator]
    value = {"+": a + b, "-": a - b, "×": a * b}[operator]
    stop = "." if language == "en" else "。"
    return Turn(think(a, b), f"{a} {operator} {b} = {value}{stop}")


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
    answer_in: Language = "en" if question.isascii() else language  # a bare "3+4" has no language
    skill = "product" if operator == "×" else "sum"
    return Example(skill, language, [user(question.format(a=a, b=b))], solve(a, operator, b, answer_in))
