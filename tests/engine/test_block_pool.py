"""The paged blocks and the prefix cache, without a model."""

from __future__ import annotations

import pytest
from engine_fakes import MemoryStore, make_request

from tern.engine.block_pool import BlockPool, IntegrityError
from tern.engine.sampling_state import SamplingState
from tern.engine.sequence import Sequence


def sequence(tokens: list[int], *, salt: bytes = b"") -> Sequence:
    request = make_request("r", tokens, cache_salt=salt)
    return Sequence(request, max_length=99, stop_ids=frozenset(), sampling=SamplingState(request, frozenset()))


def compute(pool: BlockPool, tokens: list[int], *, salt: bytes = b"") -> Sequence:
    """A sequence that found its prefix, owns its blocks and is computed whole."""
    made = sequence(tokens, salt=salt)
    found = pool.find_prefix(made)
    pool.share(made, found)
    pool.reserve(made)
    made.num_cached_tokens = (len(found) + pool.restore(made, len(found))) * pool.block_size
    made.num_computed_tokens = len(tokens)
    pool.remember(made, made.num_cached_tokens)
    return made


def test_a_freed_prompt_is_found_again_and_shared() -> None:
    pool = BlockPool(8, 4)
    first = compute(pool, list(range(10)))
    blocks = list(first.block_table)
    second = compute(pool, [*range(8), 50, 51])
    assert second.block_table[:2].tolist() == blocks[:2]
    assert [pool.ref_counts[block] for block in blocks] == [2, 2, 1]
    pool.check_integrity([first, second])
    pool.release(first)
    pool.release(second)
    pool.check_integrity([])
    assert pool.num_free_blocks == 8
    assert compute(pool, list(range(10))).num_cached_tokens == 8


def test_the_last_token_is_always_computed() -> None:
    pool = BlockPool(8, 4)
    pool.release(compute(pool, list(range(8))))
    assert compute(pool, list(range(8))).num_cached_tokens == 4
    assert compute(pool, list(range(9))).num_cached_tokens == 8


def test_a_block_is_found_only_after_the_same_beginning() -> None:
    pool = BlockPool(8, 4)
    compute(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert pool.find_prefix(sequence([5, 6, 7, 8, 9])) == []
    assert pool.find_prefix(sequence([9, 9, 9, 9, 5, 6, 7, 8, 9])) == []


def test_salts_keep_owners_apart() -> None:
    pool = BlockPool(8, 4)
    compute(pool, list(range(9)), salt=b"a")
    assert pool.find_prefix(sequence(list(range(9)), salt=b"b")) == []
    assert len(pool.find_prefix(sequence(list(range(9)), salt=b"a"))) == 2


def test_a_colliding_digest_is_not_a_hit() -> None:
    pool = BlockPool(8, 4)
    known = compute(pool, list(range(9)))
    stranger = sequence([7, 7, 7, 7, 7])
    stranger.digests = [known.digests[0]]  # as if SHA-256 had collided
    assert pool.find_prefix(stranger) == []


def test_eviction_takes_empty_blocks_then_the_least_recently_used_leaves_first() -> None:
    pool = BlockPool(6, 4)
    old = compute(pool, list(range(8)))
    new = compute(pool, list(range(20, 28)))
    old_blocks, new_blocks = list(old.block_table), list(new.block_table)
    pool.release(old)
    pool.release(new)
    taker = compute(pool, list(range(40, 44)))
    assert taker.block_table[0] not in old_blocks + new_blocks
    taker = compute(pool, list(range(60, 68)))
    assert taker.block_table.tolist()[1:] == [old_blocks[1]]
    assert len(pool.find_prefix(sequence(list(range(9))))) == 1
    assert len(pool.find_prefix(sequence(list(range(20, 29))))) == 2
    compute(pool, list(range(80, 84)))
    assert pool.find_prefix(sequence(list(range(9)))) == []


def test_a_hit_makes_a_block_recent() -> None:
    pool = BlockPool(4, 4)
    pool.release(compute(pool, [1, 1, 1, 1]))
    pool.release(compute(pool, [2, 2, 2, 2]))
    pool.release(compute(pool, [1, 1, 1, 1, 9]))  # uses the first again
    compute(pool, [3] * 12)  # needs three of four blocks
    assert len(pool.find_prefix(sequence([1, 1, 1, 1, 9]))) == 1
    assert pool.find_prefix(sequence([2, 2, 2, 2, 9])) == []


def test_the_same_content_computed_twice_is_indexed_once() -> None:
    pool = BlockPool(8, 4)
    twins = [sequence([5] * 8), sequence([5] * 8)]
    for twin in twins:
        pool.reserve(twin)
    for twin in twins:
        twin.num_computed_tokens = 8
        pool.remember(twin, 0)
    pool.check_integrity(twins)
    assert pool.num_cached_blocks == 2
    for twin in twins:
        pool.release(twin)
    pool.check_integrity([])


def test_without_caching_nothing_is_remembered() -> None:
    pool = BlockPool(8, 4, caching=False)
    pool.release(compute(pool, list(range(9))))
    assert pool.num_cached_blocks == 0
    assert compute(pool, list(range(9))).num_cached_tokens == 0


def test_blocks_that_memory_has_lost_come_from_the_store() -> None:
    store = MemoryStore()
    pool = BlockPool(4, 4, store=store)
    pool.release(compute(pool, list(range(13))))
    pool.release(compute(pool, [50] * 16))
    assert pool.find_prefix(sequence(list(range(13)))) == []
    again = compute(pool, [*range(12), 99])
    assert again.num_cached_tokens == 12
    pool.check_integrity([again])
    assert len(pool.find_prefix(sequence(list(range(13))))) == 3, "they are in memory again"
    pool.release(again)
    assert compute(BlockPool(4, 4, store=store), list(range(9))).num_cached_tokens == 8, "another process"


def test_the_store_continues_what_memory_still_has() -> None:
    store = MemoryStore()
    pool = BlockPool(4, 4, store=store)
    pool.release(compute(pool, list(range(13))))
    pool.release(compute(pool, [50] * 12))  # takes three of four blocks; the root, freed last, stays
    store.calls.clear()
    again = compute(pool, list(range(13)))
    table = again.block_table.tolist()
    assert again.num_cached_tokens == 12
    assert ("restore", table[1:3]) in store.calls
    assert ("offer", table[:3]) in store.calls, "what was found counts as used too"


def test_what_is_missing_in_the_store_ends_the_prefix_and_the_last_token_is_computed() -> None:
    store = MemoryStore()
    first = compute(BlockPool(8, 4, store=store), list(range(16)))
    whole = compute(BlockPool(8, 4, store=store), list(range(16)))
    assert whole.num_cached_tokens == 12
    del store.kept[first.digests[1]]
    assert compute(BlockPool(8, 4, store=store), list(range(17))).num_cached_tokens == 4
    assert compute(BlockPool(8, 4, store=store), list(range(17)), salt=b"a").num_cached_tokens == 0


def test_only_blocks_in_the_index_are_offered() -> None:
    store = MemoryStore()
    pool = BlockPool(8, 4, store=store)
    twins = [sequence([5] * 8), sequence([5] * 8)]
    for twin in twins:
        pool.reserve(twin)
        twin.num_computed_tokens = 8
    for twin in twins:
        pool.remember(twin, 0)
    assert [blocks for kind, blocks in store.calls if kind == "offer"] == [twins[0].block_table.tolist()]
    pool.forget(twins[1])
    assert len(store.kept) == 2, "its blocks hold nothing that could be found"
    pool.forget(twins[0])
    assert store.kept == {}


def test_the_store_hears_of_reuse_before_it_happens() -> None:
    store = MemoryStore()
    pool = BlockPool(2, 4, store=store)
    first = compute(pool, list(range(8)))
    blocks = first.block_table.tolist()
    pool.release(first)
    pool.release(compute(pool, [40]))
    pool.release(compute(pool, [41, 42]))  # takes the same block, which holds nothing now
    assert [call for call in store.calls if call[1]] == [("offer", blocks), ("rescue", blocks[1:])]


def test_without_caching_there_is_no_store() -> None:
    store = MemoryStore()
    pool = BlockPool(4, 4, caching=False, store=store)
    pool.release(compute(pool, list(range(9))))
    assert compute(pool, list(range(9))).num_cached_tokens == 0
    assert store.calls == []


def leak(pool: BlockPool, _: Sequence) -> None:
    pool.ref_counts[pool._free.popitem()[0]] = 0


def count_twice(pool: BlockPool, owner: Sequence) -> None:
    pool.ref_counts[owner.block_table[0]] += 1


def list_twice(_: BlockPool, owner: Sequence) -> None:
    owner.block_table.append(owner.block_table[0])


def change_content(_: BlockPool, owner: Sequence) -> None:
    owner.token_ids[0] += 1


def lose_digest(pool: BlockPool, owner: Sequence) -> None:
    del pool._index[owner.digests[0]]


@pytest.mark.parametrize("damage", [leak, count_twice, list_twice, change_content, lose_digest])
def test_the_integrity_check_sees_damage(damage: object) -> None:
    pool = BlockPool(8, 4)
    owner = compute(pool, list(range(9)))
    pool.check_integrity([owner])
    damage(pool, owner)  # type: ignore[operator]
    with pytest.raises(IntegrityError):
        pool.check_integrity([owner])
