"""Steps of random prompts, computed for what they take and not for what they give. Knows lengths; computes nothing."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Ordered

import torch

from tern.engine.request import CONTINUE, Finish, GeneratedToken, Request, Steering
from tern.engine.sampling_params import SamplingParams
from tern.engine.sampling_state import SamplingState
from tern.engine.scheduler import Chunk
from tern.engine.sequence import Sequence


def trial_step(
    lengths: Ordered[int],
    *,
    vocab_size: int,
    block_size: int,
    max_model_len: int,
    own_blocks: bool,
    max_drafts: int = 0,
) -> tuple[list[Chunk], int]:
    """A step of whole prompts of these lengths, each of which draws a token, and the number of blocks that it takes.

    Of each, all tokens but the first are drafts, up to `max_drafts`. All lie in the same blocks, from the first on,
    unless they have their own.
    """
    generator = torch.Generator().manual_seed(7)
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=1, logprobs=5, max_tokens=None)
    chunks, first, blocks = [], 0, 0
    for place, length in enumerate(lengths):
        ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
        given = max(1, length - max_drafts)
        request = Request(f"trial-{place}", tuple(ids[:given]), params, Nobody())
        state = SamplingState(request, frozenset())
        sequence = Sequence(request, max_length=max_model_len, stop_ids=frozenset(), sampling=state)
        owned = -(-length // block_size)
        sequence.block_table = array("q", range(first, first + owned))
        blocks = max(blocks, first + owned)
        first += owned if own_blocks else 0
        chunks.append(Chunk(sequence, given, samples=True, drafts=tuple(ids[given:])))
    return chunks, blocks


class Nobody:
    """A sink that is given nothing."""

    def push(self, token: GeneratedToken) -> Steering:  # noqa: ARG002
        return CONTINUE

    def finish(self, finish: Finish) -> None:
        """Never called."""
