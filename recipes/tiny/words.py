"""Word lists and made-up words, and the split that keeps evaluation words out of training.

Every word that can name a tool, a parameter or a value belongs to one side for good: its checksum decides. Only
the words of the model card's weather request are fixed to training.
"""

from __future__ import annotations

import random
import tomllib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHARE = 8
"""One word (and one arithmetic problem) in this many is held out."""

TRAINED = frozenset({"weather", "location", "unit", "Beijing", "北京", "天气", "c", "f"})


def is_held_out(text: str) -> bool:
    """Whether `text` is kept for evaluation."""
    return text not in TRAINED and zlib.crc32(text.encode()) % SHARE == 0


LISTS: dict[str, Any] = tomllib.loads((Path(__file__).parent / "words.toml").read_text(encoding="utf-8"))

TOPICS: list[tuple[str, str]] = list(LISTS["topics"].items())
"""What tools are about, in English and Chinese."""
ASKING_VERBS: list[str] = LISTS["asking_verbs"]
DOING_VERBS_ZH: dict[str, str] = LISTS["doing_verbs"]
DOING_VERBS = list(DOING_VERBS_ZH)
CITIES: dict[str, list[str]] = LISTS["cities"]
PEOPLE: dict[str, list[str]] = LISTS["people"]
THINGS: dict[str, list[str]] = LISTS["things"]
WEEKDAYS: dict[str, list[str]] = LISTS["weekdays"]
PARAMETERS = {kind: list(names.items()) for kind, names in LISTS["parameters"].items()}
"""Parameter names by kind of value, each with what a Chinese question calls it."""
ENUMS: list[tuple[str, str, list[str]]] = [tuple(enum) for enum in LISTS["enums"]["known"]]
"""Name, what a Chinese question calls it, values."""
ONSETS, VOWELS, CODAS = (LISTS["syllables"][part] for part in ("onsets", "vowels", "codas"))
CHINESE = (
    *(*CITIES["zh"], *PEOPLE["zh"], *THINGS["zh"]),
    *(chinese for _, chinese in TOPICS),
    *(chinese for names in PARAMETERS.values() for _, chinese in names),
    *(chinese for _, chinese, _ in ENUMS),
)
HAN = "".join(sorted({character for word in CHINESE for character in word if not character.isascii()}))
"""Characters of which Chinese words are made up: all that a held-out word may have, so that each is trained."""
PARAMETER_WORDS = [name for names in PARAMETERS.values() for name, _ in names if name.isalpha()]
LISTED = frozenset(
    word.lower()
    for words in (CITIES["en"], PEOPLE["en"], THINGS["en"], *(values for _, _, values in ENUMS))
    for word in words
)
ENGLISH = sorted(
    part
    for word in {*LISTED, *(topic for topic, _ in TOPICS), *(n for names in PARAMETERS.values() for n, _ in names)}
    if not is_held_out(word)
    for part in word.replace("_", " ").split()
    if len(part) > 3 and part.isascii() and part.isalpha()
)
"""Words whose pieces made-up words are blended from, so that ordinary endings are trained too."""
ORDINARY = sorted({*DOING_VERBS, *(topic for topic, _ in TOPICS if " " not in topic), *PARAMETER_WORDS} - {"weather"})
"""Words that may stand for anything, so that a name need not look like one."""


def pick(rng: random.Random, words: Sequence[str], held_out: bool) -> str:
    """A word of `words` on the wanted side of the split."""
    while True:
        word = rng.choice(words)
        if is_held_out(word) == held_out:
            return word


def syllable(rng: random.Random) -> str:
    """One pronounceable syllable."""
    return rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)


def blend(rng: random.Random) -> str:
    """The beginning of one English word and the end of another."""
    first, last = rng.choice(ENGLISH), rng.choice(ENGLISH)
    return first[: rng.randint(2, 6)] + last[-rng.randint(2, 6) :]


def made_up(rng: random.Random, held_out: bool) -> str:
    """A lower-case word that means nothing here: syllables, a blend, any letters, or an ordinary word out of place."""
    while True:
        draw = rng.random()
        if draw < 0.45:
            word = "".join(syllable(rng) for _ in range(rng.choice((1, 2, 2))))
        elif draw < 0.75:
            word = blend(rng)
        elif draw < 0.9:
            word = rng.choice(ORDINARY)
        else:
            word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 6)))
        if word not in LISTED and is_held_out(word) == held_out:
            return word


def made_up_han(rng: random.Random, held_out: bool) -> str:
    """Two to four Chinese characters that mean nothing together."""
    while True:
        word = "".join(rng.choices(HAN, k=rng.choice((2, 2, 3, 4))))
        if is_held_out(word) == held_out:
            return word


def code(rng: random.Random, held_out: bool) -> str:
    """An identifier such as ``KX-4821`` or ``b27f``."""
    while True:
        letters = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=rng.randint(1, 3)))
        digits = "".join(rng.choices("0123456789", k=rng.randint(2, 5)))
        word = rng.choice((f"{letters}-{digits}", f"{letters}{digits}", digits + letters))
        if is_held_out(word) == held_out:
            return word


def date(rng: random.Random) -> str:
    """A day as ``2025-03-14``."""
    return f"{rng.randint(2020, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
