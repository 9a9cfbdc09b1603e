"""What the tests of grammars share: sending text through one token by token."""

from __future__ import annotations

import numpy as np

from tern.chat import CompiledGrammar, Tokenizer


def bits(mask: np.ndarray) -> set[int]:
    """The token ids of a mask."""
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def read(grammar: CompiledGrammar, tokenizer: Tokenizer, text: str) -> tuple[str, bool, bool]:
    """How far `text` goes, whether the answer may end there, and whether it must.

    Masks and states are held against each other on the way.
    """
    state = grammar.start()
    ends = {token_id for token_id in tokenizer.special_ids if tokenizer.token_text(token_id) in ("</s>", "<|im_end|>")}
    done = b""
    for token_id in [*tokenizer.encode_continuation(text), None]:
        mask = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
        assert state.fill(mask, ())
        allowed = bits(mask)
        if token_id is None or token_id not in allowed:
            return done.decode(errors="replace"), bool(allowed & ends), state.ended
        state.accept(token_id)
        done += tokenizer.token_bytes(token_id)
    raise AssertionError("unreachable")
