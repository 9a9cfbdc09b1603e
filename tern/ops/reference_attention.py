"""Attention over a paged KV cache in plain torch. Knows block tables and positions; knows no layers and no requests.

Keys are visited in tiles of `TILE` positions that start at multiples of `TILE`, with the running softmax of flash
attention (arXiv 2205.14135), all in float32. So no score matrix is ever larger than [heads, rows, TILE], a long context
costs no more memory than a short one, and a row meets the same tiles in the same order whether it stands in a prefill
chunk or decodes, alone or in a batch; a tile that holds nothing for a row changes nothing in it, exactly.

Rows that need the same arithmetic are computed together, as the plan of a step says:

    decodes (and other queries of a few tokens), longest first        a chunk of 600 tokens
    tile        0     1     2     3                                   rows    0..255   256..511   512..599
    sequence a  ####  ####  ####  ##..                                        one      one        one
    sequence b  ####  ####  #...                                              group    group      group
    sequence c  ###.                                                  each group sees tiles up to its last row
    the group shrinks from tile to tile: nothing is padded to the longest
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from tern.ops.reference import pad_rows, read_kv

TILE = 256  # keys visited at once
MAX_GROUP_ROWS = 256  # query rows computed at once
MAX_GROUP_SEQUENCES = 64  # sequences whose keys are gathered at once
MAX_GROUPED_QUERY = 16  # queries of up to so many tokens share a group with others of the same length


@dataclass(frozen=True)
class Tile:
    """The keys of one tile for the first `sequences` sequences of a group.

    `slots` [sequences * TILE] are cache slots. `hidden` [sequences, rows, TILE] is True for keys that a row must not
    see; None: it sees all.
    """

    sequences: int
    slots: Tensor
    hidden: Tensor | None


@dataclass(frozen=True)
class Group:
    """Query rows of equal count from one or several sequences: `rows` [sequences, rows] index the step's tokens."""

    rows: Tensor
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class AttentionPlan:
    """How one step's queries meet the cache; the same for every layer, so it is made once a step."""

    groups: tuple[Group, ...]


def plan_attention(query_starts: Tensor, context_lens: Tensor, block_tables: Tensor, block_size: int) -> AttentionPlan:
    """Group a step's queries.

    Sequence s owns the query rows `query_starts[s] : query_starts[s + 1]`, the last positions of a context of
    `context_lens[s]` tokens whose slots lie in the blocks `block_tables[s]`. Shapes [S + 1], [S], [S, max_blocks].
    """
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    by_length: dict[int, list[int]] = defaultdict(list)
    groups: list[Group] = []
    for sequence, context in enumerate(contexts):
        start, end = starts[sequence], starts[sequence + 1]
        if 0 < end - start <= MAX_GROUPED_QUERY:
            by_length[end - start].append(sequence)
            continue
        for first in range(start, end, MAX_GROUP_ROWS):
            last = min(first + MAX_GROUP_ROWS, end)
            groups.append(_group([sequence], [first], last - first, [context - (end - last)], block_tables, block_size))
    for length, sequences in sorted(by_length.items()):
        sequences.sort(key=lambda sequence: -contexts[sequence])
        size = min(MAX_GROUP_SEQUENCES, MAX_GROUP_ROWS // length)
        for first in range(0, len(sequences), size):
            members = sequences[first : first + size]
            first_rows = [starts[sequence] for sequence in members]
            lengths = [contexts[sequence] for sequence in members]
            groups.append(_group(members, first_rows, length, lengths, block_tables, block_size))
    return AttentionPlan(tuple(groups))


def _group(
    members: list[int], first_rows: list[int], rows: int, contexts: list[int], block_tables: Tensor, block_size: int
) -> Group:
    """`rows` query rows of each of the `members`, from `first_rows` on, the last of which sees `contexts` keys.

    `contexts` must not grow along the group: the sequences that reach a tile are then its first ones.
    """
    device = block_tables.device
    offsets = torch.arange(rows, device=device)
    tables = block_tables[torch.tensor(members, device=device)]
    # The last key that each row may see: its own position.
    last_keys = torch.tensor(contexts, device=device)[:, None] - rows + offsets
    tiles = []
    for start in range(0, contexts[0], TILE):
        reached = sum(context > start for context in contexts)
        keys = torch.arange(start, start + TILE, device=device)
        blocks = tables[:reached, (keys // block_size).clamp(max=tables.shape[1] - 1)]
        slots = blocks * block_size + keys % block_size
        all_visible = start + TILE <= contexts[reached - 1] - rows + 1
        hidden = None if all_visible else keys > last_keys[:reached, :, None]
        tiles.append(Tile(reached, slots.flatten(), hidden))
    return Group(torch.tensor(first_rows, device=device)[:, None] + offsets, tuple(tiles))


def paged_attention(queries: Tensor, key_cache: Tensor, value_cache: Tensor, plan: AttentionPlan) -> Tensor:
    """Causal attention of a step's queries over their contexts, scaled by 1 / sqrt(D) -> [T, N, D].

    `queries` [T, N, D], rotated; one layer's caches (`kv_cache_shapes`), which already hold the step's own keys and
    values. Query head n reads key/value head n // (N / G). Slots outside a context are never read into a result.
    """
    output = torch.zeros_like(queries)
    kv_heads, head_dim = value_cache.shape[0], queries.shape[2]
    for group in plan.groups:
        sequences, rows = group.rows.shape
        chosen = queries[group.rows.flatten()].float() / math.sqrt(head_dim)
        # [sequences, G, rows * N/G, D]: the query heads that share a key head become rows of one product.
        chosen = chosen.view(sequences, rows, kv_heads, -1, head_dim).transpose(1, 2).flatten(2, 3)
        attended = _attend(chosen, key_cache, value_cache, group)
        attended = attended.view(sequences, kv_heads, rows, -1, head_dim).transpose(1, 2).reshape(sequences * rows, -1)
        output.view(output.shape[0], -1)[group.rows.flatten()] = attended.to(output.dtype)
    return output


def _attend(queries: Tensor, key_cache: Tensor, value_cache: Tensor, group: Group) -> Tensor:
    """One group: `queries` [S, G, R, D] float32 (R = rows * N/G) over the caches -> [S, G, R, D]."""
    wanted = queries.shape[2]
    queries = pad_rows(queries)
    highest = queries.new_full((*queries.shape[:3], 1), -math.inf)
    total = torch.zeros_like(highest)
    mixed = torch.zeros_like(queries)
    for tile in group.tiles:
        live = slice(tile.sequences)
        tile_keys, tile_values = (_by_head(rows, tile) for rows in read_kv(key_cache, value_cache, tile.slots))
        scores = queries[live] @ tile_keys.transpose(2, 3)
        if tile.hidden is not None:
            by_row = scores[:, :, :wanted].view(*scores.shape[:2], group.rows.shape[1], -1, TILE)
            by_row.masked_fill_(tile.hidden[:, None, :, None], -math.inf)
            # 0 * NaN is NaN: what no row may see must not even be multiplied by a weight of zero.
            unseen = tile.hidden.all(dim=1)[:, None, :, None]
            tile_values.masked_fill_(unseen, 0.0)
        new_highest = torch.maximum(highest[live], scores.amax(dim=-1, keepdim=True))
        shrink = (highest[live] - new_highest).exp_()
        weights = scores.sub_(new_highest).exp_()
        total[live] = total[live] * shrink + weights.sum(dim=-1, keepdim=True)
        mixed[live] = mixed[live] * shrink + weights @ tile_values
        highest[live] = new_highest
    return (mixed / total)[:, :, :wanted]


def _by_head(rows: Tensor, tile: Tile) -> Tensor:
    """A tile's keys or values [sequences * TILE, G, D] -> [sequences, G, TILE, D] in float32."""
    by_sequence = rows.view(tile.sequences, TILE, *rows.shape[1:])
    return by_sequence.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
