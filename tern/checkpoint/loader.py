"""Files -> network: maps the files, fills the network's tensors one by one, builds the model.

Knows how to move bytes; which bytes go where is `placement`'s, and where a model's files are is `source`'s business.
Memory: a stored tensor that is already the canonical one (whole, same dtype, not transposed, on the CPU) is used where
it is mapped and costs nothing until it is read; the others are allocated once and filled piece by piece straight from
the mapped files. No second copy of the model, and no temporary larger than one stored tensor, ever exists; of one that
is packed from a few bits to others, the floats between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

import torch

from tern import ops
from tern.checkpoint.integer_formats import join_parts
from tern.checkpoint.inventory import Inventory, take_inventory
from tern.checkpoint.packed_files import load_packed, write_packed
from tern.checkpoint.placement import Piece, plan_pieces
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
from tern.checkpoint.safetensors_file import WEIGHT_DTYPES, MappedFiles, TensorEntry
from tern.checkpoint.source import ModelSource
from tern.checkpoint.stored_weights import StoredWeight, fill, is_plain
from tern.checkpoint.synthetic import synthetic_parameters, synthetic_tensors
from tern.errors import OptionError
from tern.model import ErnieModel, float32_parameters, parameter_shapes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CPU = torch.device("cpu")

Plan = dict[str, list[Piece]]


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantization: str | None = None,
    progress: bool = True,
) -> ErnieModel:
    """Build the network that `source` describes, with its weights in `dtype` on `device`.

    `quantization` "wint4" or "wint8" packs linear weights and experts as they are read; None does so too, on the CPU,
    where the files hold weights of few bits (`ModelSource.default_quantization`), "none" never. `dtype` None takes that
    of the config, or failing that the one the embeddings are stored in. Routers and correction biases are float32
    always. MTP weights that the files lack are left out without a word.

    Raises `CheckpointError` that lists every tensor that is missing, surplus, misshapen or of an unsupported dtype and
    every file that is missing or damaged, and `OptionError` for a dtype that networks do not run in or a quantization
    that there is not.
    """
    tensors = load_tensors(source, dtype=dtype, device=device, quantization=quantization, progress=progress)
    return ErnieModel(source.config, tensors)


def load_tensors(
    source: ModelSource,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantization: str | None = None,
    progress: bool = True,
) -> dict[str, ops.Weight]:
    """The weights alone, by canonical name (`tern.model.parameter_shapes`); arguments and errors as in `load_model`."""
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype}: networks run in bfloat16, float16 or float32.")
    device = torch.device(device)
    ops.prepare(device)
    if source.stored_bits is not None:
        check_quantization(f"wint{source.stored_bits}", device)
        if quantization not in (None, f"wint{source.stored_bits}"):
            raise OptionError(
                f"quantization is {quantization!r}, but {source.name} is packed in {source.stored_bits} bits already: "
                "leave it out."
            )
        return load_packed(source, source.stored_bits, dtype, progress=progress)
    quantization = choose_quantization(quantization, source.default_quantization, device)
    if source.synthetic_seed is not None:
        dtype = dtype or _config_dtype(source) or torch.bfloat16
        seed = source.synthetic_seed
        return synthetic_tensors(source.config, seed, dtype, device, quantization=quantization, progress=progress)
    plan = plan_checkpoint(source)
    return _fill(plan, source, dtype or _stored_dtype(source, plan), device, quantization, progress)


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
            return synthetic_parameters({name: shapes[name] for name in names}, config, seed, dtype, quantization)

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
    plan: Plan,
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None,
    progress: bool,
) -> dict[str, ops.Weight]:
    shapes = _storable_shapes(source)
    wide = float32_parameters(source.config)
    files = MappedFiles()
    tensors: dict[str, ops.Weight] = {}
    total = sum(piece.entry.nbytes for pieces in plan.values() for piece in pieces)
    with byte_progress(f"Loading {source.name}", total, enabled=progress) as advance:
        for name, pieces in plan.items():
            target = _target_dtype(name, pieces, wide, dtype, quantization)
            tensors[name] = _parameter(name, pieces, shapes[name], target, device, files, quantization)
            advance(sum(piece.entry.nbytes for piece in pieces))
    if quantization is not None:
        pack_tied_head(tensors, source.config, quantization)
    return tensors


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
    """One parameter as the network keeps it. A stack that is packed is filled one expert at a time."""
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
