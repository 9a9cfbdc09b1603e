"""What an ERNIE-4.5 network is made of: the numbers of a `config.json`, checked. Knows no tensors and no files.

A `config.json` is untrusted input: every value is checked for its type and its range before anything is sized by it,
and everything that is wrong is reported at once. A key that is absent takes the default of transformers'
`Ernie4_5Config` and `Ernie4_5_MoeConfig`; the sizes of the network have none and must be there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tern.errors import UnsupportedConfigError

Architecture = Literal["moe", "dense"]

# The first name of each architecture is its `model_type`, the others stand under `architectures`.
ARCHITECTURE_NAMES: dict[Architecture, tuple[str, ...]] = {
    "moe": ("ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
    "dense": ("ernie4_5", "Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
}
DTYPES = ("bfloat16", "float16", "float32")

MAX_VOCAB_SIZE = 2**22
MAX_WIDTH = 2**20
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_EXPERTS = 4096
MAX_SHARED_EXPERTS = 64
MAX_EOS_TOKENS = 64
MAX_POSITIONS = 2**24  # positions are rotated in float32, which counts exactly up to here

# Features that some member of the wider family has and this network lacks: the one value each key may have.
_ONLY_SUPPORTED: dict[str, object] = {
    "hidden_act": "silu",
    "moe_gate_act": "softmax",
    "compression_ratio": 1.0,
    "partial_rotary_factor": 1.0,
}


@dataclass(frozen=True)
class ErnieConfig:
    """The shape of one ERNIE-4.5 network, in the names of its `config.json`.

    `architecture` "dense" has no experts; its `moe_*` numbers are 0 and `is_moe_layer` is False throughout.
    `moe_layer_end_index` is the index of the last layer that may be MoE, never -1. `dtype` is the name of the type the
    checkpoint was saved in, None if it does not say.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    use_bias: bool
    moe_num_experts: int
    moe_k: int
    moe_intermediate_size: int
    moe_num_shared_experts: int
    moe_layer_start_index: int
    moe_layer_end_index: int
    moe_layer_interval: int
    moe_norm_min: float
    num_nextn_predict_layers: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: str | None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ErnieConfig:
        """Read the contents of a `config.json`.

        Raises `UnsupportedConfigError`, whose `problems` list every key that is missing, impossible or unsupported.
        """
        if not isinstance(raw, Mapping):
            raise UnsupportedConfigError(f"A config.json must hold one JSON object, but this one holds {_shown(raw)}.")
        architecture = _architecture(raw)
        reader = _Reader(raw)
        trunk = _read_trunk(reader)
        fields = {
            "architecture": architecture,
            **trunk,
            **_read_attention(reader, trunk["hidden_size"]),
            **(_read_experts(reader, trunk["num_hidden_layers"]) if architecture == "moe" else _NO_EXPERTS),
            **_read_tokens(reader, trunk["vocab_size"]),
        }
        for key, only in _ONLY_SUPPORTED.items():
            if raw.get(key) not in (None, only):
                reader.problem(f"{key} is {_shown(raw[key])}: only {only!r} is supported")
        if reader.problems:
            raise UnsupportedConfigError(
                "This config.json describes a network that Tern does not run; what is wrong with it:",
                problems=reader.problems,
            )
        return cls(**fields)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (counted from 0) routes its tokens to experts."""
        return (
            self.moe_num_experts > 0
            and (layer + 1) % self.moe_layer_interval == 0
            and self.moe_layer_start_index <= layer <= self.moe_layer_end_index
        )

    @property
    def has_head_bias(self) -> bool:
        """Whether the output head adds a bias: with `use_bias` the MoE family's does, the dense family's does not."""
        return self.use_bias and self.architecture == "moe"


_NO_EXPERTS: dict[str, Any] = {
    "moe_num_experts": 0,
    "moe_k": 0,
    "moe_intermediate_size": 0,
    "moe_num_shared_experts": 0,
    "moe_layer_start_index": 0,
    "moe_layer_end_index": 0,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
}


def _architecture(raw: Mapping[str, Any]) -> Architecture:
    """The architecture that `model_type`, or failing that `architectures`, names."""
    model_type = raw.get("model_type")
    listed = raw.get("architectures")
    names = [model_type] if model_type is not None else (listed if isinstance(listed, list) else [])
    for architecture, known in ARCHITECTURE_NAMES.items():
        if any(name in known for name in names if isinstance(name, str)):
            return architecture
    given = f"model_type {_shown(model_type)}" if model_type is not None else f"architectures {_shown(listed)}"
    multimodal = "_vl" in str(names).lower()
    reason = "is a multimodal network" if multimodal else "is not known to Tern"
    supported = " and ".join(f"{names[0]} ({names[1]})" for names in ARCHITECTURE_NAMES.values())
    raise UnsupportedConfigError(f"The config.json's {given} {reason}: Tern runs the text models {supported}.")


def _read_trunk(reader: _Reader) -> dict[str, Any]:
    """Everything but attention, experts and tokens."""
    return {
        "vocab_size": reader.integer("vocab_size", 1, MAX_VOCAB_SIZE),
        "hidden_size": reader.integer("hidden_size", 1, MAX_WIDTH),
        "intermediate_size": reader.integer("intermediate_size", 1, MAX_WIDTH),
        "num_hidden_layers": reader.integer("num_hidden_layers", 1, MAX_LAYERS),
        "max_position_embeddings": reader.integer("max_position_embeddings", 1, MAX_POSITIONS, default=131072),
        "rms_norm_eps": reader.number("rms_norm_eps", 0.0, 1.0, default=1e-5),
        "rope_theta": _read_rope_theta(reader),
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", default=True),
        "use_bias": reader.boolean("use_bias", default=False),
        "num_nextn_predict_layers": reader.integer("num_nextn_predict_layers", 0, 1, default=0),
        "dtype": reader.choice(("dtype", "torch_dtype"), DTYPES),
    }


def _read_attention(reader: _Reader, hidden_size: int) -> dict[str, Any]:
    """Heads and their width. Absent, `head_dim` is hidden size / heads and `num_key_value_heads` is one per head."""
    heads = reader.integer("num_attention_heads", 1, MAX_HEADS)
    kv_heads = reader.integer("num_key_value_heads", 1, MAX_HEADS, default=heads)
    if heads and kv_heads and heads % kv_heads:
        reader.problem(f"num_attention_heads is {heads}: it must be a multiple of num_key_value_heads, {kv_heads}")
    head_dim = reader.integer("head_dim", 2, MAX_HEAD_DIM, default=0)
    if reader.raw.get("head_dim") is None and hidden_size and heads:
        head_dim = hidden_size // heads
        if hidden_size % heads:
            reader.problem(f"hidden_size is {hidden_size}: without head_dim it must be a multiple of the {heads} heads")
        elif not 2 <= head_dim <= MAX_HEAD_DIM:
            reader.problem(f"hidden_size / num_attention_heads is {head_dim}: it must be from 2 to {MAX_HEAD_DIM}")
    if head_dim % 2:
        reader.problem(f"head_dim is {head_dim}: it must be even, rotary embedding turns pairs")
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}


def _read_rope_theta(reader: _Reader) -> float:
    """The rotary base, from the top level or from `rope_parameters`; any rope type but the default is a problem."""
    places: list[tuple[str, Mapping[str, Any]]] = [("", reader.raw)]
    for key in ("rope_parameters", "rope_scaling"):
        rope = reader.raw.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            reader.problem(f"{key} is {_shown(rope)}: it must be an object")
            continue
        places.append((f"{key}.", rope))
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            reader.problem(f"{key} asks for rope type {_shown(rope_type)}: only 'default' is supported")
        if rope.get("partial_rotary_factor") not in (None, 1):
            reader.problem(
                f"{key}.partial_rotary_factor is {_shown(rope['partial_rotary_factor'])}: only 1 is supported"
            )
    found = [
        (f"{place}rope_theta", values["rope_theta"]) for place, values in places if values.get("rope_theta") is not None
    ]
    thetas = {reader.checked_number(name, value, 1.0, 1e12) for name, value in found}
    if len(thetas) > 1:
        reader.problem("rope_theta is given twice with different values: " + ", ".join(f"{n} {v!r}" for n, v in found))
    return thetas.pop() if thetas else 500000.0


def _read_experts(reader: _Reader, num_layers: int) -> dict[str, Any]:
    """The routed and shared experts and which layers have them."""
    experts = reader.integer("moe_num_experts", 1, MAX_EXPERTS, alias="num_experts")
    chosen = reader.integer("moe_k", 1, MAX_EXPERTS, alias="num_experts_per_tok")
    if experts and chosen > experts:
        reader.problem(f"moe_k is {chosen}: it cannot exceed the {experts} experts of moe_num_experts")
    end = reader.integer("moe_layer_end_index", -1, MAX_LAYERS, default=-1)
    return {
        "moe_num_experts": experts,
        "moe_k": chosen,
        "moe_intermediate_size": reader.integer("moe_intermediate_size", 1, MAX_WIDTH),
        "moe_num_shared_experts": reader.integer("moe_num_shared_experts", 0, MAX_SHARED_EXPERTS, default=2),
        "moe_layer_start_index": reader.integer("moe_layer_start_index", 0, MAX_LAYERS, default=1),
        "moe_layer_end_index": num_layers - 1 if end == -1 else end,
        "moe_layer_interval": reader.integer("moe_layer_interval", 1, MAX_LAYERS, default=1),
        "moe_norm_min": reader.number("moe_norm_min", 0.0, 1e6, default=1e-12),
    }


def _read_tokens(reader: _Reader, vocab_size: int) -> dict[str, Any]:
    """The special token ids; null means that there is none."""
    last_token = (vocab_size or MAX_VOCAB_SIZE) - 1
    eos = reader.raw.get("eos_token_id", min(2, last_token))
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if len(listed) > MAX_EOS_TOKENS:
        reader.problem(f"eos_token_id lists {len(listed)} tokens: at most {MAX_EOS_TOKENS} are supported")
        listed = []
    return {
        "bos_token_id": reader.token("bos_token_id", last_token, default=1),
        "eos_token_ids": tuple(reader.checked_integer("eos_token_id", token, 0, last_token) for token in listed),
        "pad_token_id": reader.token("pad_token_id", last_token, default=0),
    }


class _Reader:
    """Takes typed values out of a raw config and collects what is wrong with them.

    After a problem the value returned is 0 (or False, or None): reading goes on to the next key, and what compares two
    values stays silent about a pair of which one was wrong by itself.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.problems: list[str] = []

    def problem(self, sentence: str) -> None:
        self.problems.append(sentence)

    def integer(self, key: str, low: int, high: int, *, default: int | None = None, alias: str | None = None) -> int:
        """A whole number from `low` to `high`; null counts as absent. `alias` is a newer name of the same key."""
        value = self.raw.get(key)
        if value is None and alias is not None and self.raw.get(alias) is not None:
            key, value = alias, self.raw[alias]
        if value is None:
            if default is None:
                self.problem(f"{key} is missing: give a whole number from {low} to {high}")
                return 0
            return default
        return self.checked_integer(key, value, low, high)

    def checked_integer(self, key: str, value: object, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            hint = " (a list, one per modality, belongs to the multimodal family)" if isinstance(value, list) else ""
            self.problem(f"{key} is {_shown(value)}: it must be a whole number from {low} to {high}{hint}")
            return 0
        return value

    def number(self, key: str, low: float, high: float, *, default: float) -> float:
        """A number above `low` and at most `high`; null counts as absent."""
        value = self.raw.get(key)
        return default if value is None else self.checked_number(key, value, low, high)

    def checked_number(self, key: str, value: object, low: float, high: float) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # `float()` of a huge JSON integer overflows, so the range is asked before any conversion.
        if not is_number or not low < value <= high or not math.isfinite(value):  # type: ignore[operator, arg-type]
            self.problem(f"{key} is {_shown(value)}: it must be a number above {low:g} and at most {high:g}")
            return 0.0
        return float(value)  # type: ignore[arg-type]

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problem(f"{key} is {_shown(value)}: it must be true or false")
            return default
        return value

    def choice(self, keys: tuple[str, ...], allowed: tuple[str, ...]) -> str | None:
        """The first of `keys` that is given, which must be one of `allowed`; None if none is."""
        for key in keys:
            value = self.raw.get(key)
            if value is None:
                continue
            if value not in allowed:
                self.problem(f"{key} is {_shown(value)}: it must be one of {', '.join(allowed)}")
                return None
            return str(value)
        return None

    def token(self, key: str, last_token: int, *, default: int) -> int | None:
        """A token id, or None where the config says null; absent, `default` if the vocabulary has it."""
        value = self.raw.get(key, min(default, last_token))
        return None if value is None else self.checked_integer(key, value, 0, last_token)


def _shown(value: object) -> str:
    """`value` for a message, cut to a length a reader can bear."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**63 else "a number of more than 63 bits"
    return text if len(text) <= 80 else text[:77] + "..."
