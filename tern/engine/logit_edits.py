"""What requests want changed in their logits: bias, penalties and masks, as entries that reach a device in one copy.

Knows rows of `SamplingState`s; knows no draw. Nothing here spans the vocabulary: a row costs the entries it concerns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tern.engine.sampling_state import SamplingRow, SamplingState

_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Edit:
    """One kind of change for all rows that want it.

    `apply` takes the logits [rows, vocab], which it changes in place, and `arrays` as tensors beside them.
    """

    apply: Callable[..., None]
    arrays: tuple[_Array, ...]


def plan_edits(rows: Ordered[int], sequences: Ordered[SamplingRow], held: Container[int]) -> list[Edit]:
    """What changes the logits of `rows`, in the order in which it must be applied.

    The masks of rows that are `held` by a grammar stand in the grammar's.
    """
    states = [(row, sequences[row].sampling) for row in rows]
    edits = []
    biased = [(row, state) for row, state in states if len(state.bias_ids)]
    if biased:
        values = np.concatenate([state.bias_values for _, state in biased])
        edits.append(Edit(_add, (*_entries([(row, state.bias_ids) for row, state in biased]), values)))
    penalised = [(row, state) for row, state in states if state.penalised]
    if penalised:
        edits.append(_penalties(penalised, sequences))
    allowed = [(row, state.allowed_ids) for row, state in states if len(state.allowed_ids)]
    if allowed:
        edits.append(Edit(_keep_only, (*_entries(allowed), np.array([row for row, _ in allowed], np.int64))))
    masked = [(row, state.masked_ids(sequences[row].token_ids)) for row, state in states if row not in held]
    if any(len(ids) for _, ids in masked):
        edits.append(Edit(_forbid, _entries(masked)))
    return edits


def _entries(parts: Ordered[tuple[int, npt.NDArray[np.int64]]]) -> tuple[_Array, _Array]:
    """The entries (row, token) of a matrix, for rows given with their token ids."""
    lengths = [len(ids) for _, ids in parts]
    rows = np.repeat(np.array([row for row, _ in parts], np.int64), lengths)
    return rows, np.concatenate([ids for _, ids in parts])


def _penalties(rows: Ordered[tuple[int, SamplingState]], sequences: Ordered[SamplingRow]) -> Edit:
    """The tokens that each row has seen, how often, and what that costs them."""
    histories = []
    for row, state in rows:
        state.catch_up(sequences[row].token_ids)
        assert state.history is not None
        histories.append((row, state.history.ids, state.history.counts))
    counts = np.concatenate([counts for _, _, counts in histories])
    penalties = np.array(
        [(s.params.repetition_penalty, s.params.presence_penalty, s.params.frequency_penalty) for _, s in rows],
        np.float32,
    )
    penalties = penalties.repeat([len(ids) for _, ids, _ in histories], axis=0)
    return Edit(_penalise, (*_entries([(row, ids) for row, ids, _ in histories]), counts, *penalties.T))


def _add(logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> None:
    logits[rows, tokens] += values


def _penalise(
    logits: Tensor,
    rows: Tensor,
    tokens: Tensor,
    counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Repetition divides positive and multiplies negative logits; presence and frequency subtract."""
    values = logits[rows, tokens]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[rows, tokens] = values - presence * (counts > 0) - frequency * counts


def _keep_only(logits: Tensor, rows: Tensor, tokens: Tensor, kept_rows: Tensor) -> None:
    """Mask all but some entries of the `kept_rows` that they stand in."""
    kept = logits[rows, tokens]
    logits.index_fill_(0, kept_rows, -math.inf)
    logits[rows, tokens] = kept


def _forbid(logits: Tensor, rows: Tensor, tokens: Tensor) -> None:
    logits[rows, tokens] = -math.inf
