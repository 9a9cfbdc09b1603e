"""Files -> network: maps the files, fills the network's tensors one by one, builds the model.

Knows how to move bytes; which bytes go where is `placement`'s, and where a model's files are is `source`'s business.
Memory: a stored tensor that is already the canonical one (whole, same dtype, not transposed, on the CPU) is used where
it is mapped and costs nothing until it is read; the others are allocated once and filled piece by piece straight from
the mapped files. No second copy of the model, and no temporary larger than one stored tensor, ever exists.
"""

from __future__ import annotations

import math

import torch

from tern.checkpoint.inventory import take_inventory
from tern.checkpoint.placement import Piece, plan_pieces
from tern.checkpoint.problems import Problems
from tern.checkpoint.progress import byte_progress
from tern.checkpoint.safetensors_file import WEIGHT_DTYPES, MappedFiles
from tern.checkpoint.source import ModelSource
from tern.checkpoint.synthetic import synthetic_tensors
from tern.errors import OptionError
from tern.model import ErnieModel, float32_parameters, parameter_shapes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Plan = dict[str, list[Piece]]


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> ErnieModel:
    """Build the network that `source` describes, with its weights in `dtype` on `device`.

    `dtype` None takes the config's, or failing that the one the embeddings are stored in. Routers and correction biases
    are float32 always. MTP weights that the files lack are left out without a word.

    Raises `CheckpointError` that lists every tensor that is missing, surplus, misshapen or of an unsupported dtype and
    every file that is missing or damaged, and `OptionError` for a dtype that networks do not run in.
    """
    return ErnieModel(source.config, load_tensors(source, dtype=dtype, device=device, progress=progress))


def load_tensors(
    source: ModelSource,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """The weights alone, by canonical name (`tern.model.parameter_shapes`); arguments and errors as in `load_model`."""
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype}: networks run in bfloat16, float16 or float32.")
    device = torch.device(device)
    if source.synthetic_seed is not None:
        dtype = dtype or _config_dtype(source) or torch.bfloat16
        return synthetic_tensors(source.config, source.synthetic_seed, dtype, device, progress=progress)
    plan = plan_checkpoint(source)
    dtype = dtype or _config_dtype(source) or WEIGHT_DTYPES[plan["embed"][0].entry.dtype]
    return _fill(plan, source, dtype, device, progress)


def plan_checkpoint(source: ModelSource) -> Plan:
    """Read the headers of the files and map every canonical tensor to its pieces, or raise what is wrong with them."""
    problems = Problems()
    inventory = take_inventory(source.directory, problems)
    plan: Plan = {}
    if inventory.entries or not problems:
        plan = plan_pieces(inventory.entries, inventory.lost, _storable_shapes(source), source.config, problems)
    if problems:
        problems.fail(source.directory)
    return plan


def _storable_shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """The network's parameters, with the optional bias that an MTP projection may bring along."""
    shapes = parameter_shapes(source.config)
    if "mtp.proj.weight" in shapes:
        shapes.setdefault("mtp.proj.bias", shapes["mtp.proj.weight"][:1])
    return shapes


def _config_dtype(source: ModelSource) -> torch.dtype | None:
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(
        source.config.dtype or ""
    )


def _fill(
    plan: Plan, source: ModelSource, dtype: torch.dtype, device: torch.device, progress: bool
) -> dict[str, torch.Tensor]:
    shapes = _storable_shapes(source)
    wide = float32_parameters(source.config)
    files = MappedFiles()
    tensors = {}
    total = sum(piece.entry.nbytes for pieces in plan.values() for piece in pieces)
    with byte_progress(f"Loading {source.name}", total, enabled=progress) as advance:
        for name, pieces in plan.items():
            target_dtype = torch.float32 if name in wide else dtype
            tensors[name] = _assemble(pieces, shapes[name], target_dtype, device, files)
            advance(sum(piece.entry.nbytes for piece in pieces))
    return tensors


def _assemble(
    pieces: list[Piece], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, files: MappedFiles
) -> torch.Tensor:
    """One canonical tensor: the mapped one itself where that serves, else a new one filled from its pieces."""
    first = pieces[0]
    whole = math.prod(first.shape) == math.prod(shape) and not first.transposed
    if whole and WEIGHT_DTYPES[first.entry.dtype] == dtype and device.type == "cpu":
        return files.tensor(first.entry).view(shape)
    tensor = torch.empty(shape, dtype=dtype, device=device)
    for piece in pieces:
        stored = files.tensor(piece.entry)
        place = tensor if piece.expert is None else tensor[piece.expert]
        place[piece.rows].copy_(stored.t() if piece.transposed else stored.view(piece.shape))
    return tensor
