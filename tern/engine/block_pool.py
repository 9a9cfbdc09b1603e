"""The blocks of the KV cache: who owns which, which are free, and what the free ones still hold.

Knows block numbers and token ids; knows neither tensors nor requests' order of service. A block is owned by every
sequence that lists it in its block table (`ref_counts`), or it is free. A full block whose keys and values are computed
enters the index under the digest of its tokens and all before them, and stays there after it is freed until it is
needed for something else, least recently used first. A prompt that begins with indexed blocks starts with them:

    digest_0 = sha256(sha256(salt) + tokens of block 0)     digest_i = sha256(digest_{i-1} + tokens of block i)

A table is freed from its end, so that of one chain the leaves are evicted before the root.

A `BlockStore` is a second level: it is offered every block that enters the index, and a prompt that goes on behind the
indexed blocks is continued from it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from tern.engine.sequence import Sequence


class IntegrityError(RuntimeError):
    """The engine's books contradict each other: a defect of Tern, never of a request."""


@dataclass(frozen=True)
class CachedBlock:
    """What an indexed block holds: the digest of the whole chain, and its own tokens (int64 bytes) to compare.

    `parent` is the digest of the block before it, None for the first.
    """

    digest: bytes
    tokens: bytes
    parent: bytes | None


class BlockStore(Protocol):
    """Where blocks are kept that leave the cache (`tern.engine.disk_cache`). Only `restore` may take its time."""

    def offer(self, blocks: Iterable[tuple[int, CachedBlock]]) -> None:
        """Keep these blocks, which hold this content until `rescue`; known ones count as used now."""

    def rescue(self, contents: Iterable[CachedBlock]) -> None:
        """The blocks of these are reused when this returns."""

    def remove(self, contents: Iterable[CachedBlock]) -> None:
        """Forget these."""

    def restore(self, blocks: Iterable[tuple[int, CachedBlock]]) -> int:
        """Fill blocks with what is kept of their content, up to the first of which nothing is -> how many."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens; with `caching`, freed blocks are found again by their content."""

    def __init__(
        self, num_blocks: int, block_size: int, *, caching: bool = True, store: BlockStore | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
        self.store = store if caching else None
        self.ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next to be reused first
        self._content: dict[int, CachedBlock] = {}
        self._index: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence owns; some may still hold reusable content."""
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks whose content can be found again, owned or free."""
        return len(self._content)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def blocks_missing(self, sequence: Sequence, num_drafts: int = 0) -> int:
        """Blocks that the sequence needs beyond its own, for all its tokens and as many drafts behind them."""
        return self.blocks_for(len(sequence.token_ids) + num_drafts) - len(sequence.block_table)

    def extend_digests(self, sequence: Sequence) -> None:
        """Bring the sequence's digests up to its last full block."""
        if not self.caching:
            return
        digests = sequence.digests
        parent = digests[-1] if digests else hashlib.sha256(sequence.request.cache_salt).digest()
        for index in range(len(digests), len(sequence.token_ids) // self.block_size):
            parent = hashlib.sha256(parent + self._tokens(sequence, index)).digest()
            digests.append(parent)

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """The longest run of indexed blocks with which the sequence begins.

        Tokens that must be computed for their logits are never covered (`num_reusable_tokens`).
        """
        self.extend_digests(sequence)
        found: list[int] = []
        for index in range(self._num_reusable(sequence)):
            block = self._index.get(sequence.digests[index])
            if block is None or self._content[block].tokens != self._tokens(sequence, index):
                break
            found.append(block)
        return found

    def num_free_without(self, blocks: Iterable[int]) -> int:
        """Free blocks left once `blocks` are taken."""
        return len(self._free) - sum(self.ref_counts[block] == 0 for block in blocks)

    def share(self, sequence: Sequence, blocks: Iterable[int]) -> None:
        """Let the sequence own already computed blocks."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                del self._free[block]
            self.ref_counts[block] += 1
            sequence.block_table.append(block)

    def reserve(self, sequence: Sequence, num_drafts: int = 0) -> None:
        """Give the sequence blocks for its tokens and drafts; the caller has made sure that enough are free."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(self.blocks_missing(sequence, num_drafts))]
        contents = self._drop_contents(blocks)
        if contents and self.store is not None:
            self.store.rescue(contents)
        for block in blocks:
            self.ref_counts[block] = 1
            sequence.block_table.append(block)

    def restore(self, sequence: Sequence, num_found: int) -> int:
        """Fill the sequence's blocks behind its first `num_found`, which were found, from the store -> how many."""
        if self.store is None:
            return 0
        behind = range(num_found, self._num_reusable(sequence))
        restored = self.store.restore(
            (sequence.block_table[index], self._describe(sequence, index)) for index in behind
        )
        for index in behind[:restored]:
            self._enter(sequence, index)
        self._offer(sequence, 0, num_found + restored)  # those that were found too: they are in use
        return restored

    def remember(self, sequence: Sequence, first_token: int) -> None:
        """Index the sequence's full blocks that end after position `first_token` and are computed."""
        first, last = first_token // self.block_size, sequence.num_computed_tokens // self.block_size
        if not self.caching or first == last:
            return
        self.extend_digests(sequence)
        for index in range(first, last):
            self._enter(sequence, index)
        self._offer(sequence, first, last)

    def forget(self, sequence: Sequence) -> None:
        """Let the content of the sequence's blocks not be found again."""
        contents = self._drop_contents(sequence.block_table)
        if contents and self.store is not None:
            self.store.remove(contents)

    def release(self, sequence: Sequence) -> None:
        """Take all blocks from the sequence. Content that can be found again is reused last."""
        self._release(sequence, 0)

    def trim(self, sequence: Sequence) -> None:
        """Take the blocks beyond the sequence's tokens, which rejected drafts had."""
        self._release(sequence, self.blocks_for(len(sequence.token_ids)))

    def _release(self, sequence: Sequence, first: int) -> None:
        for block in reversed(sequence.block_table[first:]):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self._free[block] = None
                if block not in self._content:
                    self._free.move_to_end(block, last=False)
        del sequence.block_table[first:]

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raise `IntegrityError` unless `sequences` own exactly the blocks that are not free."""
        counts = [0] * self.num_blocks
        for sequence in sequences:
            _demand(len(set(sequence.block_table)) == len(sequence.block_table), f"{sequence} lists a block twice")
            for block in sequence.block_table:
                counts[block] += 1
            for index in range(sequence.num_computed_tokens // self.block_size):
                content = self._content.get(sequence.block_table[index])
                same = content is None or content.tokens == self._tokens(sequence, index)
                _demand(same, f"block {index} of {sequence} holds other tokens")
        _demand(counts == self.ref_counts, f"owners count {counts}, the pool {self.ref_counts}")
        free = {block for block, count in enumerate(counts) if count == 0}
        _demand(free == set(self._free), f"{len(free)} blocks have no owner but {len(self._free)} are free")
        indexed = {content.digest: block for block, content in self._content.items()}
        _demand(indexed == self._index, f"{len(self._index)} digests point at {len(self._content)} contents")

    def _num_reusable(self, sequence: Sequence) -> int:
        """Full blocks of the sequence that need not be computed."""
        return min(len(sequence.digests), sequence.num_reusable_tokens // self.block_size)

    def _enter(self, sequence: Sequence, index: int) -> None:
        """Put a computed block of the sequence into the index."""
        block, digest = sequence.block_table[index], sequence.digests[index]
        if digest not in self._index and block not in self._content:  # else: computed twice at the same time
            self._index[digest] = block
            self._content[block] = self._describe(sequence, index)

    def _offer(self, sequence: Sequence, first: int, last: int) -> None:
        """Offer the sequence's blocks `first` to `last` to the store, those that are in the index themselves."""
        table = sequence.block_table[first:last]
        if self.store is not None and (known := [block for block in table if block in self._content]):
            self.store.offer([(block, self._content[block]) for block in known])

    def _drop_contents(self, blocks: Iterable[int]) -> list[CachedBlock]:
        """Take blocks out of the index -> what was found in them."""
        contents = [content for block in blocks if (content := self._content.pop(block, None)) is not None]
        for content in contents:
            del self._index[content.digest]
        return contents

    def _describe(self, sequence: Sequence, index: int) -> CachedBlock:
        parent = sequence.digests[index - 1] if index else None
        return CachedBlock(sequence.digests[index], self._tokens(sequence, index), parent)

    def _tokens(self, sequence: Sequence, index: int) -> bytes:
        return sequence.token_ids[index * self.block_size : (index + 1) * self.block_size].tobytes()


def _demand(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(message)
