"""A model argument -> where its files are and what network they hold. Knows no weights.

A model is named by nothing (the embedded one), a directory, a GGUF file, `dummy:` and a preset or a config.json, or a
hub id.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from tern.checkpoint.generation import FILE_NAME, GenerationConfig
from tern.checkpoint.gguf_model import SUFFIX, gguf_names, model_name, read_gguf_model
from tern.checkpoint.integer_formats import IntegerScheme, read_scheme
from tern.checkpoint.inventory import file_names
from tern.checkpoint.json_file import read_json_object
from tern.checkpoint.presets import PRESETS
from tern.checkpoint.quantisation import PACKED_FORMAT, PACKED_METHOD, QUANTIZATIONS, UNFINISHED
from tern.checkpoint.safetensors_file import TensorEntry
from tern.errors import CheckpointError, OptionError, UnsupportedConfigError
from tern.model import ErnieConfig

EMBEDDED_NAME = "tern-tiny"
DUMMY_PREFIX = "dummy:"
MAX_SEED = 2**63 - 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class ModelSource:
    """A model that is ready to be loaded.

    `name` is how the user would call it. `directory` holds tokenizer, template and, unless `synthetic_seed` is set, the
    weights; with `synthetic_seed` the weights are random. `raw_config` is what `config.json` says, word for word.
    `stored_bits`: the files hold weights packed in so many bits. `default_quantization`: the packing into which weights
    that the files hold in few bits are read, if nothing else is asked for. `scheme`: how they are kept as integers.

    Of a GGUF file, `entries` lists the tensors, and `text_files` holds by name what a directory would hold beside
    `config.json` and the weights; both are None for a directory.
    """

    name: str
    directory: Path
    config: ErnieConfig
    generation: GenerationConfig
    synthetic_seed: int | None = None
    raw_config: Mapping[str, Any] = field(default_factory=dict)
    stored_bits: int | None = None
    default_quantization: str | None = None
    scheme: IntegerScheme | None = None
    entries: tuple[TensorEntry, ...] | None = field(default=None, repr=False)
    text_files: Mapping[str, bytes] | None = field(default=None, repr=False)


def embedded_model_directory() -> Path:
    """Where the model that ships with the package lies."""
    return Path(__file__).resolve().parent.parent / "embedded" / "tiny"


def resolve_model(
    model: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    token: str | None = None,
    progress: bool = True,
    weights: bool = True,
) -> ModelSource:
    """Find the model that `model` names, downloading it if it is a hub id, and read its configuration.

    `model` is None (the embedded model), a directory, a GGUF file (any part of it, if it is in several),
    `dummy:PRESET` or `dummy:/path/to/config.json` (either with `?seed=N`), or a hub id `owner/name`, of which
    `revision` names the branch, tag or commit and `token` opens a private or gated one. `progress` shows a bar while
    downloading. Without `weights` only the descriptions of a hub model are downloaded: enough to say what it is, not to
    load it.

    Raises `CheckpointError` if there is no such model or its configuration is unreadable, `UnsupportedConfigError` if
    Tern does not run that network, `HubError` if it cannot be downloaded, `OptionError` for a revision that does not
    apply.
    """
    model = None if model is None else os.fspath(model)
    if model is not None and model.startswith(DUMMY_PREFIX):
        source = _synthetic_source(model)
    elif model is None:
        source = _directory_source(embedded_model_directory(), EMBEDDED_NAME)
    elif os.path.isdir(expanded := os.path.expanduser(model)):
        directory = Path(expanded).resolve()
        source = _directory_source(directory, directory.name)
    elif expanded.endswith(SUFFIX) and os.path.isfile(expanded):
        source = _gguf_source(Path(expanded).absolute())
    elif _HUB_ID.fullmatch(model) and not os.path.exists(model):
        # Imported here: most models are local, and the hub's client takes its time to import.
        from tern.checkpoint.hub import download_snapshot

        directory = download_snapshot(model, revision=revision, token=token, progress=progress, weights=weights)
        return _directory_source(directory, model)
    else:
        raise CheckpointError(_explain_unknown(model))
    if revision is not None:
        raise OptionError(f"revision is {revision!r}, but {source.name} is no hub id: only those have revisions.")
    return source


def _directory_source(directory: Path, name: str) -> ModelSource:
    path = directory / "config.json"
    present = file_names(directory)
    if path.name not in present and UNFINISHED in present:
        raise CheckpointError(f"{directory} is half written: run the tern quantize command that made it again.")
    if path.name not in present and (models := gguf_names(present)):
        if len(models) > 1:
            names = ", ".join(models[:4])
            raise CheckpointError(f"{directory} has {len(models)} GGUF models ({names}): give the path of one.")
        return _gguf_source(directory / models[0])
    if path.name not in present:
        raise CheckpointError(f"{directory} has no config.json: give the directory of a Hugging Face checkpoint.")
    raw = read_json_object(path)
    config = _parse_config(path, raw)
    generation = GenerationConfig.from_directory(directory, config)
    bits, scheme = _stored_form(path, raw)
    return ModelSource(
        name,
        directory,
        config,
        generation,
        raw_config=raw,
        stored_bits=bits,
        default_quantization=None if scheme is None else f"wint{scheme.bits}",
        scheme=scheme,
    )


def _gguf_source(path: Path) -> ModelSource:
    found = read_gguf_model(path)
    try:
        config = ErnieConfig.from_dict(found.config)
    except UnsupportedConfigError as error:
        raise UnsupportedConfigError(
            f"{path} describes a network that Tern does not run, in the terms of config.json:", problems=error.problems
        ) from error
    try:
        generation = GenerationConfig.from_dict(found.generation, config)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} has values that cannot be used, in the terms of {FILE_NAME}:", problems=error.problems
        ) from error
    return ModelSource(
        model_name(path),
        path.parent,
        config,
        generation,
        raw_config=found.config,
        default_quantization=found.quantization,
        entries=found.entries,
        text_files=found.text_files,
    )


def _parse_config(path: Path, raw: dict[str, Any]) -> ErnieConfig:
    try:
        return ErnieConfig.from_dict(raw)
    except UnsupportedConfigError as error:
        message, *_ = str(error).split("\n")
        raise UnsupportedConfigError(f"{path}: {message}", problems=error.problems) from error


def _stored_form(path: Path, raw: dict[str, Any]) -> tuple[int | None, IntegerScheme | None]:
    """Bits of the weights that a checkpoint packed by Tern holds, or the scheme of integers; neither: plain weights."""
    quantization = raw.get("quantization_config")
    if not quantization:
        return None, None
    fields = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
    if (scheme := read_scheme(fields, path)) is not None:
        return None, scheme
    if fields.get("quant_method") != PACKED_METHOD:
        raise UnsupportedConfigError(
            f"{path} describes weights quantised by {str(fields.get('quant_method'))[:40]!r}, which Tern does not "
            "read: use the checkpoint in bfloat16, with --quantization, or in gptq, awq or compressed-tensors."
        )
    bits, form = fields.get("bits"), fields.get("format")
    if form != PACKED_FORMAT or not isinstance(bits, int) or bits not in QUANTIZATIONS.values():
        raise UnsupportedConfigError(
            f"{path} describes packed weights of format {str(form)[:20]} in {str(bits)[:20]} bits; this version reads "
            f"format {PACKED_FORMAT} in 4 or 8 bits: pack the checkpoint again with tern quantize."
        )
    return bits, None


def _synthetic_source(model: str) -> ModelSource:
    name, _, query = model.removeprefix(DUMMY_PREFIX).partition("?")
    seed = _read_seed(model, query)
    directory = embedded_model_directory()
    path = os.path.expanduser(name)
    if name.lower() in PRESETS:
        raw = PRESETS[name.lower()]
        config = ErnieConfig.from_dict(raw)
    elif name.endswith(".json") or os.path.isdir(path):
        file = Path(path, "config.json") if os.path.isdir(path) else Path(path)
        raw = read_json_object(file)
        config = _parse_config(file, raw)
        if any((file.parent / tokenizer).exists() for tokenizer in TOKENIZER_FILES):
            directory = file.resolve().parent
    else:
        raise CheckpointError(
            f"There is no preset {name!r} for {DUMMY_PREFIX}; known are {', '.join(PRESETS)}, "
            f"or give a network's own description: {DUMMY_PREFIX}/path/to/config.json."
        )
    generation = GenerationConfig.from_dict({}, config)
    return ModelSource(model, directory, config, generation, synthetic_seed=seed, raw_config=raw)


def _read_seed(model: str, query: str) -> int:
    options = dict(parse_qsl(query, keep_blank_values=True))
    text = options.pop("seed", "0")
    if options:
        raise CheckpointError(f"{model!r} has the unknown option {next(iter(options))!r}: only seed=N is known.")
    if not re.fullmatch("[0-9]{1,19}", text) or int(text) > MAX_SEED:
        raise CheckpointError(f"{model!r} has the seed {text[:40]!r}: it must be a whole number from 0 to {MAX_SEED}.")
    return int(text)


def _explain_unknown(model: str) -> str:
    """Why `model` names nothing, and what would."""
    if os.path.isfile(os.path.expanduser(model)):
        return f"{model} is a file: give the directory of the checkpoint, or a {SUFFIX} file."
    ways = (
        f"give the directory of a checkpoint, a {SUFFIX} file, a hub id such as baidu/ERNIE-4.5-21B-A3B-Thinking, "
        f"or {DUMMY_PREFIX}"
    )
    preset = model.lower() if model.lower() in PRESETS else "PRESET"
    return f"{model[:200]!r} is neither a directory nor a hub id: {ways}{preset} for random weights."
