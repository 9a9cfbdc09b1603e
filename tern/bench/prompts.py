"""Prompts of random words, and how many words make a wanted number of tokens. Knows no server and no tokenizer."""

from __future__ import annotations

import os
import random

_COMMON = """
about after again air all also animal answer around ask away back because before began below between big book
both boy build call came change city close cold country cross day different door down draw each earth east eat
end enough every eye face family far farm father feet few field find fire first fish follow food found four
friend from girl give good great green ground group grow hand hard head hear help here high home horse hot house
idea keep kind land large last later learn leave left letter life light line list little live long look made
make mark mean mile moon morning mother mountain move much music name near need never new next night north note
number off often old open order other page paper part people picture place plain plant point press read ready
rest right river road rock room round rule run school sea second seem sentence ship short show side simple since
sing sleep slow small song sound south spell stand star start stay still stop story street study such sun sure
table take talk tell ten thing three time top town travel tree true turn under until voice walk want warm watch
water way week well west wind wood word work world write year young
"""
WORDS = tuple(_COMMON.split())
DISTINCT_WORDS = 6
"""Words at the beginning of a prompt that no other run begins with: no cache of an earlier run answers."""


class RandomPrompts:
    """Texts of random words: after their beginning, the same ones for the same `seed`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._run = os.urandom(16).hex()

    def text(self, words: int, label: str) -> str:
        """A prompt of so many words; each `label` has its own."""
        beginning = random.Random(f"{self._run}/{label}").choices(WORDS, k=min(words, DISTINCT_WORDS))
        return " ".join([*beginning, *random.Random(f"{self.seed}/{label}").choices(WORDS, k=words - len(beginning))])


class WordCount:
    """How many words make a prompt of `wanted` tokens: a line through what a server counts for `first` and `second`."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        # Two short prompts to have counted: how long a word is in tokens is not known yet.
        self.first = max(1, wanted // 16)
        self.second = max(self.first + 1, wanted // 4)

    def words(self, first_tokens: int, second_tokens: int) -> int:
        """The words wanted, from what the two prompts came to in tokens; at least one."""
        each = max((second_tokens - first_tokens) / (self.second - self.first), 0.1)
        return max(1, round(self.first + (self.wanted - first_tokens) / each))
