"""Decides which tensors of the files fill which rows of the network's tensors. Knows names and shapes, moves no data.

Orientation. PyTorch stores a linear weight `[out, in]`, Paddle `[in, out]`. Linear means every projection, the router,
`lm_head` and the MTP projection; embeddings, norms, biases and fused experts are never transposed. A checkpoint is
assumed to be in one orientation as a whole, which its non-square linear weights show; square ones follow them. Only if
all were square would the prefix `ernie.` decide. A weight that contradicts the others is reported as misshapen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from functools import partial

from tern.checkpoint.layouts import UNUSED, Kind, Match, has_experts, match_name, name_of, parts_of
from tern.checkpoint.problems import Problems
from tern.checkpoint.stored_weights import StoredWeight, is_readable
from tern.model import OPTIONAL_PARAMETERS, ErnieConfig

Shape = tuple[int, ...]
Place = tuple[int | slice, ...]
"""An index into a tensor."""

SHOWN_PARTS = 6  # missing parts of one tensor that are named before the rest is counted


@dataclass(frozen=True)
class Piece:
    """A file's tensor and the place it fills, `place` of a canonical tensor: rows, of one expert's or of all experts'.

    `shape` is the shape of that place, which the stored tensor has once it is transposed if `transposed` says so (and
    but for leading dimensions of 1).
    """

    entry: StoredWeight
    place: Place
    shape: Shape
    transposed: bool


@dataclass(frozen=True)
class _Candidate:
    entry: StoredWeight
    match: Match
    place: Place
    shape: Shape


def plan_pieces(
    entries: Iterable[StoredWeight],
    lost: Set[str],
    shapes: Mapping[str, Shape],
    config: ErnieConfig,
    problems: Problems,
) -> dict[str, list[Piece]]:
    """Map each canonical tensor of `shapes` to the pieces that fill it; what does not fit goes to `problems`.

    `lost` names tensors of unreadable files, whose absence is reported already. Tensors that the network has no use for
    are passed over in silence where that is ordinary: a head beside tied embeddings, MTP weights that the config does
    not ask for. MTP weights that are asked for but wholly absent are left out of the plan.
    """
    candidates = [found for entry in entries if (found := _candidate(entry, shapes, config, problems)) is not None]
    lost_matches = [match for match in map(match_name, sorted(lost)) if match is not None]
    _check_cover(candidates, lost_matches, shapes, problems)
    transposed = _is_transposed(candidates)
    plan: dict[str, list[Piece]] = defaultdict(list)
    for candidate in candidates:
        if _fits(candidate, transposed, config, problems):
            linear = candidate.match.rule.kind is Kind.LINEAR
            piece = Piece(candidate.entry, candidate.place, candidate.shape, linear and transposed)
            plan[candidate.match.target].append(piece)
    return {target: plan[target] for target in shapes if target in plan}


def _candidate(
    entry: StoredWeight, shapes: Mapping[str, Shape], config: ErnieConfig, problems: Problems
) -> _Candidate | None:
    """The place that a stored tensor's name gives it, or None if it has none (noted if that is wrong)."""
    match = match_name(entry.name)
    if match is None:
        problems.add("surplus", f"{entry.name} {list(entry.shape)} is no tensor of this architecture")
        return None
    shape = shapes.get(match.target)
    if shape is None or (match.expert is not None and match.expert >= shape[0]):
        if not _may_be_unused(match.target, config):
            problems.add("surplus", f"{entry.name} {list(entry.shape)} has no place in the network of config.json")
        return None
    place, shape = _place(match, shape, config)
    return _Candidate(entry, match, place, shape)


def _may_be_unused(target: str, config: ErnieConfig) -> bool:
    tied_head = config.tie_word_embeddings and target == "head"
    return tied_head or target == UNUSED or (config.num_nextn_predict_layers == 0 and target.startswith("mtp."))


def _place(match: Match, shape: Shape, config: ErnieConfig) -> tuple[Place, Shape]:
    """Where in a canonical tensor of this shape a stored one goes, and the shape of that place."""
    if not has_experts(match.target):
        rows = _rows(match.rule.part, shape[0], config)
        return (rows,), (rows.stop - rows.start, *shape[1:])
    rows = _rows(match.rule.part, shape[1], config)
    inner = (rows.stop - rows.start, *shape[2:])
    if match.expert is None:
        return (slice(None), rows), (shape[0], *inner)
    return (match.expert, rows), inner


def _rows(part: str | None, total: int, config: ErnieConfig) -> slice:
    """The rows that a part fills: `[ q | k | v ]`, `[ gate | up ]`, or all of them."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    bounds = {
        None: (0, total),
        "q": (0, queries),
        "k": (queries, queries + keys),
        "v": (queries + keys, total),
        "gate": (0, total // 2),
        "up": (total // 2, total),
    }
    return slice(*bounds[part])


# An expert and a part: the smallest place that files fill on their own.
_Cell = tuple[int | None, str | None]


def _cells(match: Match, shape: Shape) -> set[_Cell]:
    parts = (match.rule.part,) if match.rule.part else parts_of(match.target)
    all_experts: Iterable[int | None] = range(shape[0]) if has_experts(match.target) else (None,)
    experts = (match.expert,) if match.expert is not None else all_experts
    return {(expert, part) for expert in experts for part in parts}


def _check_cover(
    candidates: Collection[_Candidate], lost: Iterable[Match], shapes: Mapping[str, Shape], problems: Problems
) -> None:
    """Every canonical tensor must be filled, and no part of it twice."""
    filled: dict[str, dict[_Cell, str]] = defaultdict(dict)
    for candidate in candidates:
        target = candidate.match.target
        cells = _cells(candidate.match, shapes[target])
        if rivals := [filled[target][cell] for cell in cells if cell in filled[target]]:
            problems.add("stored twice", f"{target} comes from {min(rivals)} and from {candidate.entry.name}; keep one")
        filled[target] |= dict.fromkeys(cells, candidate.entry.name)
    for match in lost:
        if match.target in shapes:
            filled[match.target] |= dict.fromkeys(_cells(match, shapes[match.target]), "an unreadable file")
    name = partial(
        name_of,
        known={candidate.match.rule.source for candidate in candidates},
        prefix="ernie." if any(candidate.entry.name.startswith("ernie.") for candidate in candidates) else "model.",
        gguf=any(candidate.match.rule.gguf for candidate in candidates),
    )
    has_mtp = any(target.startswith("mtp.") for target in filled)
    for target, shape in shapes.items():
        if target not in OPTIONAL_PARAMETERS and (has_mtp or not target.startswith("mtp.")):
            _check_filled(target, shape, filled[target], name, problems)


def _check_filled(
    target: str, shape: Shape, filled: Mapping[_Cell, str], name: Callable[..., str], problems: Problems
) -> None:
    """Report the parts of a canonical tensor that nothing fills, under the names that the checkpoint gives them."""
    experts: Iterable[int | None] = range(shape[0]) if has_experts(target) else (None,)
    absent = [(part, expert) for expert in experts for part in parts_of(target) if (expert, part) not in filled]
    names = list(dict.fromkeys(name(target, *cell) for cell in absent))
    if names:
        others = f" and {len(names) - SHOWN_PARTS} more" if len(names) > SHOWN_PARTS else ""
        problems.add("missing", f"{', '.join(names[:SHOWN_PARTS])}{others}, needed for {target} {list(shape)}")


def _is_transposed(candidates: Iterable[_Candidate]) -> bool:
    """Whether the checkpoint stores linear weights `[in, out]` (see the module's docstring)."""
    linear = [candidate for candidate in candidates if candidate.match.rule.kind is Kind.LINEAR]
    upright = sum(found.entry.shape == found.shape != found.shape[::-1] for found in linear)
    lying = sum(found.entry.shape == found.shape[::-1] != found.shape for found in linear)
    if upright == lying:
        return any(candidate.entry.name.startswith("ernie.") for candidate in linear)
    return lying > upright


def _fits(candidate: _Candidate, transposed: bool, config: ErnieConfig, problems: Problems) -> bool:
    """Whether the stored tensor can be read into its place; if not, says why."""
    entry, rule = candidate.entry, candidate.match.rule
    if not is_readable(entry):
        problems.add("unsupported dtype", f"{entry.name} is {entry.dtype}; weights are read from F32, F16 and BF16")
        return False
    if rule.source.endswith("self_attn.qkv_proj.weight") and config.num_key_value_heads == config.num_attention_heads:
        # Paddle then interleaves Q, K and V head by head (ernie/modeling.py, Ernie4_5_Attention.forward).
        problems.add("unsupported layout", f"{entry.name} is fused though every head has its own K and V: split it")
        return False
    expected = candidate.shape[::-1] if transposed and rule.kind is Kind.LINEAR else candidate.shape
    stored = _without_leading_ones(entry.shape) if rule.kind is Kind.ROW else entry.shape
    if stored != expected:
        swapped = rule.kind is Kind.LINEAR and stored == expected[::-1]
        hint = " (transposed, unlike the other weights)" if swapped else ""
        problems.add("misshapen", f"{entry.name} is {list(entry.shape)} instead of {list(expected)}{hint}")
        return False
    return True


def _without_leading_ones(shape: Shape) -> Shape:
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
