"""What machine this is and what fits on it, found without loading anything. Starts nothing."""

from __future__ import annotations

import os
import platform
import shlex
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from tern import __version__
from tern.bench import hardware
from tern.checkpoint import ModelSource, weight_bytes
from tern.engine.cache_size import free_memory
from tern.engine.device import LEAST_CAPABILITY
from tern.engine.fits import FLOATS, CacheNeed, Room, WeightSizes, precisions, runs_on
from tern.engine.options import EngineOptions
from tern.engine.residence import choose_residence
from tern.errors import OptionError
from tern.ops import cpu, installed_attention

PORTS = (8000, 8180)
"""Where `tern serve` and `make serve` listen unless told otherwise."""
PROCESSOR = torch.device("cpu")
UNASKED = EngineOptions()
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "fastapi", "triton")


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA card as torch sees it: its compute capability, memory in 10^9 bytes."""

    name: str
    capability: str
    memory_gb: float
    free_gb: float


@dataclass(frozen=True)
class MachineReport:
    """`isa`: the kernels that will run, of the `available` ones; `flags`: what the processor has of what they need.

    `gpu_problems`: sentences on what keeps a card from being used, or from being used well. `attention`: libraries that
    may attend prompts on a card, as `--attention-backend` names them, with their versions.
    Sizes in 10^9 bytes: `memory_limit_gb` is the control group's, None without one; `free_gb` lies within it;
    `disk_free_gb` is free in `downloads`, where models of a hub go. `free_ports`: those of `PORTS` nobody listens on.
    `versions`: of Python, Tern and the packages that matter, those that are installed.
    """

    processor: str
    processors: int
    threads: int
    isa: str
    available: list[str]
    flags: list[str]
    gpus: list[Gpu]
    gpu_problems: list[str]
    attention: dict[str, str]
    memory_gb: float
    memory_limit_gb: float | None
    free_gb: float
    downloads: str
    disk_free_gb: float
    free_ports: list[int]
    versions: dict[str, str]


@dataclass(frozen=True)
class Fit:
    """One precision of a model on one device: sizes in 10^9 bytes, and the longest context in tokens, prompt and answer
    together, that the default cache holds; 0 if the weights do not fit.

    `device` as the option `--device` names it. Of a split network `weights_gb` are on the GPU and `host_gb` beside them
    in the host's memory, and `precision` is that of either.
    """

    device: str
    precision: str
    weights_gb: float
    kv_gb_per_1000_tokens: float
    longest_context: int
    fits: bool
    host_gb: float = 0.0


@dataclass(frozen=True)
class Diagnosis:
    """What `tern doctor --json` prints.

    `download_gb`: what has to be downloaded before the model runs, 10^9 bytes in bfloat16, None if it is here.
    `advice`: the command that serves the most precise of `fits` with the longest context; None if none fits. `default`:
    the precision of `fits` in which the model is loaded unasked. `residence`: where device "auto" then puts it and why,
    or why it cannot; None without a GPU.
    """

    machine: MachineReport
    model: str | None
    max_positions: int | None
    download_gb: float | None
    fits: list[Fit]
    advice: str | None
    default: str | None = None
    residence: str | None = None

    def as_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def diagnose(source: ModelSource | None) -> Diagnosis:
    """Describe this machine, and what of `source` fits on it in each precision; its weights need not be here."""
    machine = describe_machine()
    if source is None:
        return Diagnosis(machine, None, None, None, [], None)
    forms = precisions(source)
    gpus = [torch.device("cuda", number) for number in range(len(machine.gpus))]
    fits = [_fit(source, wanted, device) for device in gpus for wanted in forms if runs_on(wanted, device)]
    fits += [fit for device in gpus for fit in _split_fits(source, device)]
    fits += [_fit(source, wanted, PROCESSOR) for wanted in forms if runs_on(wanted, PROCESSOR)]
    positions = source.config.max_position_embeddings
    default = _stored(source) or FLOATS
    advice = _advice(_argument(source), positions, fits, default)
    residence = _residence(source, gpus[0]) if gpus else None
    return Diagnosis(machine, source.name, positions, _download_gb(source), fits, advice, default, residence)


def describe_machine() -> MachineReport:
    """What this machine has, what of it is free, and which kernels run on it."""
    kernels = cpu.machine()
    downloads, limit = Path(constants.HF_HUB_CACHE), hardware.memory_limit()
    gpus, versions = _gpus(), _versions()
    return MachineReport(
        processor=hardware.processor_name(),
        processors=cpu.usable_processors(),
        threads=kernels.threads,
        isa=kernels.name,
        available=[found.name for found in cpu.instruction_sets() if found.available],
        flags=hardware.processor_flags(),
        gpus=gpus,
        gpu_problems=_gpu_problems(gpus, versions),
        attention=installed_attention(),
        memory_gb=hardware.memory_bytes() / 1e9,
        memory_limit_gb=None if limit is None else limit / 1e9,
        free_gb=free_memory(torch.device("cpu")) / 1e9,
        downloads=str(downloads),
        disk_free_gb=hardware.disk_free(downloads) / 1e9,
        free_ports=[port for port in PORTS if hardware.port_is_free(port)],
        versions={"python": platform.python_version(), "tern": __version__, **versions},
    )


def _gpus() -> list[Gpu]:
    """The cards that torch can use, in its order."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of is said by _why_none
        if not torch.cuda.is_available():
            return []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        found.append(Gpu(properties.name, f"{properties.major}.{properties.minor}", total / 1e9, free / 1e9))
    return found


def _gpu_problems(gpus: list[Gpu], versions: dict[str, str]) -> list[str]:
    """What is wrong with the cards that torch can use, or why it finds none."""
    if not gpus:
        why = _why_none()
        return [] if why is None else [why]
    least = ".".join(map(str, LEAST_CAPABILITY))
    problems = [
        f"{gpu.name} has compute capability {gpu.capability}, but bfloat16 needs {least}: use --device cpu."
        for gpu in gpus
        if tuple(map(int, gpu.capability.split("."))) < LEAST_CAPABILITY
    ]
    if "triton" not in versions:
        problems.append("Triton, which the GPU's kernels need, is not installed: pip install 'tern-llm[gpu]'.")
    return problems


def _why_none() -> str | None:
    """Why torch finds no card though NVIDIA's driver is installed; None where it is not."""
    driver = hardware.nvidia_driver()
    if driver is None:
        return None
    if torch.version.cuda is None:
        return (
            f"NVIDIA's driver is installed (version {driver}), but torch {torch.__version__} is built without CUDA: "
            "install a torch for CUDA (pytorch.org/get-started says how), and pip install 'tern-llm[gpu]'."
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {hidden!r}, which hides every card: unset it."
    return (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but finds no card beside NVIDIA's driver "
        f"(version {driver}): the driver may be too old for that CUDA, or a container may not have been given the card."
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _fit(source: ModelSource, quantization: str | None, device: torch.device) -> Fit:
    weights = weight_bytes(source.config, torch.bfloat16, quantization, gpu=device.type == "cuda")
    longest, per_token = _longest_context(source, device, weights)
    return Fit(str(device), quantization or FLOATS, weights / 1e9, per_token / 1e6, longest, longest > 0)


def _split_fits(source: ModelSource, device: torch.device) -> list[Fit]:
    """The network on this GPU with its routed experts on the CPU, in each packing of those."""
    sizes, host = WeightSizes.of(source, torch.bfloat16, None), Room.of(PROCESSOR, UNASKED, source.config)
    fits = []
    for packing, (weights, experts) in sizes.split.items():
        longest, per_token = _longest_context(source, device, weights)
        if experts > host.for_weights:
            longest = 0
        name = str(device).replace("cuda:0", "split").replace("cuda", "split")
        precision = packing if _stored(source) == packing else f"{FLOATS}+{packing}"
        fits.append(Fit(name, precision, weights / 1e9, per_token / 1e6, longest, longest > 0, experts / 1e9))
    return fits


def _stored(source: ModelSource) -> str | None:
    """The form of few bits in which a model is loaded unasked."""
    return source.default_quantization if source.stored_bits is None else f"wint{source.stored_bits}"


def _longest_context(source: ModelSource, device: torch.device, weights: int) -> tuple[int, float]:
    """What fits beside so many bytes of weights, in tokens, and the bytes of one."""
    need, room = CacheNeed.of(source, UNASKED, torch.bfloat16), Room.of(device, UNASKED, source.config)
    return room.longest_context(source.config, need, weights), need.token_size


def _residence(source: ModelSource, gpu: torch.device) -> str:
    """Where the model goes unasked, and why; or why it cannot."""
    sizes, need = WeightSizes.of(source, torch.bfloat16, None), CacheNeed.of(source, UNASKED, torch.bfloat16)
    rooms = (Room.of(device, UNASKED, source.config) for device in (gpu, PROCESSOR))
    try:
        return choose_residence(sizes, need, *rooms).reason
    except OptionError as error:
        return str(error)


def _argument(source: ModelSource) -> str:
    """How the model is named on the command line."""
    if source.entries is not None:
        return str(source.entries[0].path)
    # A directory's name holds no slash, and is not how it can be found again.
    return source.name if "/" in source.name or source.synthetic_seed is not None else str(source.directory)


def _advice(model: str, positions: int, fits: list[Fit], default: str) -> str | None:
    """How to serve what fits best: the whole context before precision, a card before the processor."""
    usable = [fit for fit in fits if fit.fits]
    if not usable:
        return None
    best = max(usable, key=lambda fit: fit.longest_context)  # the first of equals, and the most precise come first
    parts = ["tern serve", shlex.quote(model)]
    if best.device not in ("cuda:0", "cpu") or (best.device == "cpu" and any(fit.device != "cpu" for fit in fits)):
        parts.append(f"--device {best.device}")
    if best.precision != default and not best.host_gb:
        parts.append(f"--quantization {'none' if best.precision == FLOATS else best.precision}")
    if best.longest_context < positions:
        parts.append(f"--max-model-len {_rounded(best.longest_context)}")
    return " ".join(parts)


def _rounded(tokens: int) -> int:
    """A little less, in whole thousands where there are any: memory that is free now may not all be in a minute."""
    return tokens // 1024 * 1024 or tokens


def _download_gb(source: ModelSource) -> float | None:
    here = source.synthetic_seed is not None or source.entries is not None
    present = here or any(source.directory.glob("*.safetensors"))
    return None if present else weight_bytes(source.config, torch.bfloat16, None) / 1e9
