"""Files -> network: maps the files, fills the network's tensors one by one, builds the model.

Knows how to move bytes; which bytes go where is `placement`'s, and where a model's files are is `source`'s business.
Memory: a stored tensor that is already the canonical one (whole, same dtype, not transposed, on the CPU) is used where
it is mapped and costs nothing until it is read; the others are allocated once and filled piece by piece straight from
the mapped files. No second copy of the model, and no temporary larger than one stored tensor, ever exists; of one that
is packed from a few bits to others, the floats between them. To a GPU everything goes through `staging`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

import torch

from tern import ops
from tern.checkpoint.gpu_rounding import round_matrices, round_tied_head
from tern.checkpoint.integer_formats import join_parts
from tern.checkpoint.inventory import Inventory, take_inventory
from tern.checkpoint.packed_files import load_packed, write_packed
from tern.checkpoint.placement import Piece, Place, plan_pieces
from tern.checkpoint.problems import Problems
from tern.checkpoint.progress import byte_progress
from tern.checkpoint.quantisation import (
    check_quantization,
    choose_quantization,
    pack_parameter,
    pack_stack,
    pack_tied_head,
    packed_bits,
    packed_shapes,
)
from tern.checkpoint.residence import CPU, Residence, check_split
from tern.checkpoint.safetensors_file import WEIGHT_DTYPES, MappedFiles, TensorEntry
from tern.checkpoint.source import ModelSource
from tern.checkpoint.staging import Load, Staging, loads_of
from tern.checkpoint.stored_weights import StoredWeight, fill, is_plain
from tern.checkpoint.synthetic import synthetic_parameters, synthetic_tensors
from tern.errors import OptionError
from tern.model import ErnieModel, float32_parameters, parameter_shapes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Plan = dict[str, list[Piece]]


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantization: str | None = None,
    split: str | None = None,
    progress: bool = True,
) -> ErnieModel:
    """Build the network that `source` describes, with its weights in `dtype` on `device`.

    `quantization` "wint4" or "wint8" packs linear weights and experts as they are read, and on a GPU "fp8" and
    "block_wise_fp8" round them to fp8; None packs where the files hold weights of few bits
    (`ModelSource.default_quantization`), "none" never does. `split` "wint4" or "wint8" leaves the routed experts on the
    CPU, packed so, whatever is on `device`. `dtype` None takes that of the config, or failing that the one the
    embeddings are stored in. Routers and correction biases are float32 always. MTP weights that the files lack are left
    out without a word.

    Raises `CheckpointError` that lists every tensor that is missing, surplus, misshapen or of an unsupported dtype and
    every file that is missing or damaged, and `OptionError` for a dtype that networks do not run in or a quantization
    that there is not.
    """
    tensors = load_tensors(
        source, dtype=dtype, device=device, quantization=quantization, split=split, progress=progress
    )
    return ErnieModel(source.config, tensors)


def load_tensors(
    source: ModelSource,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantization: str | None = None,
    split: str | None = None,
    progress: bool = True,
) -> dict[str, ops.Weight]:
    """The weights alone, by canonical name (`tern.model.parameter_shapes`); arguments and errors as in `load_model`."""
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype}: networks run in bfloat16, float16 or float32.")
    residence = _residence(source, torch.device(device), quantization, split)
    ops.prepare(residence.device)
    if split is not None:
        ops.prepare(CPU)
    tensors = _load(source, dtype, residence, progress)
    if residence.device.type == "cuda":
        torch.cuda.empty_cache()  # the KV cache is sized by what is free
    return tensors


def _load(
    source: ModelSource, dtype: torch.dtype | None, residence: Residence, progress: bool
) -> dict[str, ops.Weight]:
    if source.stored_bits is not None:
        return load_packed(source, source.stored_bits, dtype, residence, progress=progress)
    if source.synthetic_seed is not None:
        dtype = dtype or _config_dtype(source) or torch.bfloat16
        return synthetic_tensors(source.config, source.synthetic_seed, dtype, residence, progress=progress)
    plan = plan_checkpoint(source)
    return _fill(plan, source, dtype or _stored_dtype(source, plan), residence, progress)


def _residence(source: ModelSource, device: torch.device, quantization: str | None, split: str | None) -> Residence:
    """Where the weights go and in which form, or an `OptionError` that says why they cannot."""
    if split is not None:
        check_split(split, source.config)
    if source.stored_bits is None:
        return Residence(device, choose_quantization(quantization, source.default_quantization, device), split)
    stored = f"wint{source.stored_bits}"
    check_quantization(stored, device)
    for option, value in (("quantization", quantization), ("split", split)):
        if value not in (None, stored):
            raise OptionError(
                f"{option} is {value!r}, but {source.name} is packed in {source.stored_bits} bits already: "
                "leave it out."
            )
    return Residence(device, stored, split)


def quantise_checkpoint(source: ModelSource, destination: Path, bits: int, *, progress: bool = True) -> None:
    """Write the network that `source` describes to a new directory with its weights packed in `bits` bits.

    A layer at a time is in memory. Other weights keep the type in which `load_model` would load them. What a run that
    was cut short has written is kept. Raises `OptionError` if `destination` holds something else or the source is
    packed already, `CheckpointError` if the source cannot be read or the destination not be written.
    """
    quantization = f"wint{bits}"
    check_quantization(quantization, torch.device("cpu"))
    if source.stored_bits is not None:
        raise OptionError(f"{source.name} is packed in {source.stored_bits} bits already: give the plain checkpoint.")
    seed, config = source.synthetic_seed, source.config
    if seed is not None:
        dtype, shapes = _config_dtype(source) or torch.bfloat16, packed_shapes(parameter_shapes(config), config)

        def parameters(names: Iterable[str]) -> Iterator[tuple[str, ops.Weight]]:
            chosen = {name: shapes[name] for name in names}
            return synthetic_parameters(chosen, config, seed, dtype, lambda _: quantization)

    else:
        plan = plan_checkpoint(source)
        dtype, shapes, wide = _stored_dtype(source, plan), _storable_shapes(source), float32_parameters(config)

        def parameters(names: Iterable[str]) -> Iterator[tuple[str, ops.Weight]]:
            files = MappedFiles()
            for name in names:
                stored = "embed" if name == "head" and config.tie_word_embeddings else name
                if stored in plan:
                    target = _target_dtype(stored, plan[stored], wide, dtype, quantization)
                    yield name, _parameter(name, plan[stored], shapes[stored], target, CPU, files, quantization)

    write_packed(source, destination, bits, dtype, parameters, progress=progress)


def plan_checkpoint(source: ModelSource) -> Plan:
    """Read the headers of the files and map every canonical tensor to its pieces, or raise what is wrong with them."""
    problems = Problems()
    if source.entries is None:
        inventory = take_inventory(source.directory, problems)
    else:
        inventory = Inventory(list(source.entries))
    plan: Plan = {}
    if inventory.entries or not problems:
        entries, lost = list[StoredWeight](inventory.entries), inventory.lost
        if source.scheme is not None:
            entries, lost = join_parts(inventory.entries, lost, source.scheme, problems)
        plan = plan_pieces(entries, lost, _storable_shapes(source), source.config, problems)
    if problems:
        problems.fail(source.directory)
    return plan


def _storable_shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """The network's parameters, with the optional bias that an MTP projection may bring along."""
    shapes = parameter_shapes(source.config)
    if "mtp.proj.weight" in shapes:
        shapes.setdefault("mtp.proj.bias", shapes["mtp.proj.weight"][:1])
    return shapes


def _stored_dtype(source: ModelSource, plan: Plan) -> torch.dtype:
    """The dtype to load in where none is asked for: the config's, or that of the embeddings.

    Where weights of few bits are packed, float16 is only what another engine's kernels computed in.
    """
    if source.default_quantization is not None and _config_dtype(source) in (None, torch.float16):
        return torch.bfloat16
    return _config_dtype(source) or WEIGHT_DTYPES.get(plan["embed"][0].entry.dtype, torch.bfloat16)


def _config_dtype(source: ModelSource) -> torch.dtype | None:
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(
        source.config.dtype or ""
    )


def _fill(
    plan: Plan, source: ModelSource, dtype: torch.dtype, residence: Residence, progress: bool
) -> dict[str, ops.Weight]:
    shapes = _storable_shapes(source)
    wide = float32_parameters(source.config)
    homes = {name: residence.home(name) for name in plan}
    dtypes = {name: _target_dtype(name, plan[name], wide, dtype, home.quantization) for name, home in homes.items()}
    groups = {name: _matrices(plan[name], shapes[name], dtypes[name]) for name, home in homes.items() if home.gpu}
    files = MappedFiles()
    tensors: dict[str, ops.Weight] = {}
    total = sum(piece.entry.nbytes for pieces in plan.values() for piece in pieces)
    loads = [load for name in groups for _, group in groups[name] for load in group]
    with (
        byte_progress(f"Loading {source.name}", total, enabled=progress) as advance,
        Staging(loads, files, residence.device) as staging,
    ):
        for name, home in homes.items():
            sizes = (shapes[name], dtypes[name])
            if home.gpu:
                tensors[name] = _staged(name, groups[name], *sizes, staging, residence.device, home.quantization)
            else:
                tensors[name] = _parameter(name, plan[name], *sizes, home.device, files, home.quantization)
            advance(sum(piece.entry.nbytes for piece in plan[name]))
    if residence.quantization is not None:
        if residence.home("head").gpu:
            round_tied_head(tensors, source.config, residence.quantization)
        else:
            pack_tied_head(tensors, source.config, residence.quantization)
    return tensors


def _matrices(pieces: list[Piece], shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Place, list[Load]]]:
    """The places of a parameter that are filled one after the other, each with its loads: a stack's experts, or all."""
    if len(shape) < 3:
        return [((), loads_of(pieces, dtype))]
    return [((expert,), loads_of(pieces, dtype, expert)) for expert in range(shape[0])]


def _staged(
    name: str,
    matrices: list[tuple[Place, list[Load]]],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    staging: Staging,
    device: torch.device,
    quantization: str | None,
) -> ops.Weight:
    """One parameter on a GPU, in floats or rounded there matrix by matrix."""
    if quantization is None:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        for place, loads in matrices:
            staging.fill(tensor[place], loads)
        return tensor

    def filled() -> Iterator[torch.Tensor]:
        for _, loads in matrices:
            matrix = torch.empty(shape[-2:], dtype=dtype, device=device)
            staging.fill(matrix, loads)
            yield matrix

    return round_matrices(name, shape, filled(), quantization)


def _target_dtype(
    name: str, pieces: list[Piece], wide: Set[str], dtype: torch.dtype, quantization: str | None
) -> torch.dtype:
    """The dtype to assemble a parameter in: its own; float32 for what is made floats only in order to be packed."""
    packed = quantization is not None and packed_bits(name, quantization) is not None
    computed = not all(is_plain(piece.entry) for piece in pieces)
    return torch.float32 if name in wide or (packed and computed) else dtype


def _parameter(
    name: str,
    pieces: list[Piece],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    files: MappedFiles,
    quantization: str | None,
) -> ops.Weight:
    """One parameter for the CPU, as the network keeps it. A stack that is packed is filled one expert at a time."""
    if quantization is None or packed_bits(name, quantization) is None:
        return _assemble(pieces, shape, dtype, device, files)
    if len(shape) == 3:
        experts = (_assemble_expert(pieces, expert, shape[1:], dtype, files) for expert in range(shape[0]))
        return pack_stack(name, shape, experts, quantization)
    return pack_parameter(name, _assemble(pieces, shape, dtype, device, files), quantization)


def _assemble(
    pieces: list[Piece], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, files: MappedFiles
) -> torch.Tensor:
    """One canonical tensor: the mapped one itself where that serves, else a new one filled from its pieces."""
    first, entry = pieces[0], pieces[0].entry
    whole = math.prod(first.shape) == math.prod(shape) and not first.transposed
    if isinstance(entry, TensorEntry) and WEIGHT_DTYPES.get(entry.dtype) == dtype and whole and device.type == "cpu":
        return files.tensor(entry).view(shape)
    tensor = torch.empty(shape, dtype=dtype, device=device)
    for piece in pieces:
        fill(tensor[piece.place], piece.entry, files, transposed=piece.transposed)
    return tensor


def _assemble_expert(
    pieces: list[Piece], expert: int, shape: tuple[int, ...], dtype: torch.dtype, files: MappedFiles
) -> torch.Tensor:
    """One expert of a stack, filled from its own pieces and from those that hold all experts."""
    tensor = torch.empty(shape, dtype=dtype)
    for piece in pieces:
        first, *rest = piece.place
        if first in (expert, slice(None)):
            inside = None if first == expert else expert
            fill(tensor[tuple(rest)], piece.entry, files, transposed=piece.transposed, expert=inside)
    return tensor
