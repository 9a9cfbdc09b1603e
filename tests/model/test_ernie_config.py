"""Reading a config.json: what is taken, what is refused, and that everything wrong is told at once."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Ernie4_5_MoeConfig, Ernie4_5Config

from tern.errors import CheckpointError, UnsupportedConfigError
from tern.model import ErnieConfig, float32_parameters, parameter_shapes
from tests.fuzzing import fuzz

# The config of ERNIE-4.5-21B-A3B-Thinking, after model.md.
THINKING: dict[str, Any] = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_layer_end_index": 27,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 1,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "num_attention_heads": 20,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "vocab_size": 103424,
}
DENSE: dict[str, Any] = {
    "model_type": "ernie4_5",
    "vocab_size": 103424,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


def problems(**changes: Any) -> tuple[str, ...]:
    with pytest.raises(UnsupportedConfigError) as caught:
        ErnieConfig.from_dict({**THINKING, **changes})
    return caught.value.problems


def test_the_thinking_model_has_the_size_that_its_card_states() -> None:
    config = ErnieConfig.from_dict(THINKING)
    assert config.architecture == "moe"
    assert config.head_dim == 128
    assert config.dtype == "bfloat16"
    assert [config.is_moe_layer(layer) for layer in (0, 1, 27, 28)] == [False, True, True, False]
    assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == pytest.approx(21.83e9, rel=1e-3)
    with_mtp = ErnieConfig.from_dict({**THINKING, "num_nextn_predict_layers": 1})
    assert set(parameter_shapes(with_mtp)) - set(parameter_shapes(config)) == {
        *("mtp.emb_norm", "mtp.hidden_norm", "mtp.proj.weight", "mtp.block.attn_norm", "mtp.block.mlp_norm"),
        *("mtp.block.attn.qkv.weight", "mtp.block.attn.o.weight"),
        *("mtp.block.mlp.gate_up.weight", "mtp.block.mlp.down.weight"),
    }


def test_float32_parameters_are_the_routers() -> None:
    config = ErnieConfig.from_dict({**THINKING, "num_hidden_layers": 3, "moe_layer_end_index": -1})
    names = {f"layers.{layer}.moe.{part}" for layer in (1, 2) for part in ("router", "correction_bias")}
    assert float32_parameters(config) == names
    assert names < set(parameter_shapes(config))


def test_a_dense_config() -> None:
    config = ErnieConfig.from_dict(DENSE)
    assert config.architecture == "dense"
    assert config.rope_theta == 500000.0
    assert config.eos_token_ids == (2,)
    assert config.dtype is None
    assert not any(config.is_moe_layer(layer) for layer in range(18))
    assert parameter_shapes(config)["layers.0.attn.qkv.weight"] == (20 * 128, 1024)
    assert float32_parameters(config) == frozenset()


@pytest.mark.parametrize("theirs", [Ernie4_5Config(), Ernie4_5_MoeConfig(use_bias=True, moe_layer_interval=2)])
def test_what_transformers_saves_is_read(theirs: Any) -> None:
    config = ErnieConfig.from_dict(json.loads(theirs.to_json_string(use_diff=False)))
    for name in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "use_bias", "vocab_size"):
        assert getattr(config, name) == getattr(theirs, name)
    assert config.rope_theta == 500000.0
    if config.architecture == "moe":
        assert (config.moe_layer_end_index, config.moe_layer_interval) == (27, 2)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "rope_theta", 1e6),
        ({"rope_scaling": {"type": "default"}}, "rope_theta", 500000.0),
        ({"moe_layer_end_index": -1}, "moe_layer_end_index", 27),
        ({"moe_num_experts": None, "num_experts": 32}, "moe_num_experts", 32),
        ({"moe_k": None, "num_experts_per_tok": 8}, "moe_k", 8),
        ({"moe_num_shared_experts": 0}, "moe_num_shared_experts", 0),
        ({"num_key_value_heads": None}, "num_key_value_heads", 20),
        ({"head_dim": None}, "head_dim", 128),
        ({"head_dim": 64}, "head_dim", 64),
        ({"dtype": "float32"}, "dtype", "float32"),
        ({"eos_token_id": [2, 7]}, "eos_token_ids", (2, 7)),
        ({"eos_token_id": None}, "eos_token_ids", ()),
        ({"bos_token_id": None}, "bos_token_id", None),
        ({"model_type": None}, "architecture", "moe"),
        ({"use_bias": None}, "use_bias", False),
        ({"rope_theta": 500000}, "rope_theta", 500000.0),
    ],
    ids=str,
)
def test_other_spellings(changes: dict[str, Any], field: str, value: object) -> None:
    assert getattr(ErnieConfig.from_dict({**THINKING, **changes}), field) == value


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": -5}, "hidden_size is -5"),
        ({"hidden_size": 2560.0}, "hidden_size is 2560.0"),
        ({"hidden_size": "2560"}, "hidden_size is '2560'"),
        ({"hidden_size": 10**400}, "a number of more than 63 bits"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 10**9}, "from 1 to 1024"),
        ({"hidden_size": 2561}, "must be a multiple of the 20 heads"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads, 3"),
        ({"head_dim": 127}, "must be even"),
        ({"moe_k": 65}, "cannot exceed the 64 experts"),
        ({"moe_num_experts": [64, 64]}, "belongs to the multimodal family"),
        ({"moe_layer_interval": 0}, "moe_layer_interval is 0"),
        ({"moe_norm_min": 0}, "moe_norm_min is 0"),
        ({"moe_norm_min": math.nan}, "moe_norm_min is nan"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rope_theta": math.inf}, "rope_theta is inf"),
        ({"rope_theta": 10**400}, "a number of more than 63 bits"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope type 'yarn': only 'default'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope type 'linear'"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]: it must be an object"),
        ({"rope_parameters": {"rope_theta": 10000.0}}, "rope_theta is given twice"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': only 'silu'"),
        ({"moe_gate_act": "sigmoid"}, "only 'softmax'"),
        ({"use_bias": 1}, "use_bias is 1: it must be true or false"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
        ({"eos_token_id": 103424}, "eos_token_id is 103424"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id is 'x'"),
        ({"eos_token_id": [2] * 1000}, "eos_token_id lists 1000 tokens"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2"),
        ({"max_position_embeddings": 2**25}, "max_position_embeddings is 33554432"),
    ],
    ids=str,
)
def test_one_wrong_value_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    found = problems(**changes)
    assert len(found) == 1
    assert sentence in found[0]


def test_all_problems_are_told_at_once() -> None:
    found = problems(hidden_size=-1, moe_k="6", hidden_act="relu", vocab_size=None)
    assert [text.split()[0] for text in found] == ["vocab_size", "hidden_size", "moe_k", "hidden_act"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"model_type": "ernie4_5_moe_vl"}, "multimodal"),
        ({"model_type": "ernie4_5_vl_moe"}, "multimodal"),
        ({"architectures": ["Ernie4_5_VLMoeForConditionalGeneration"]}, "multimodal"),
        ({"model_type": "qwen3_moe"}, "not known"),
        ({"model_type": 7}, "not known"),
        ({}, "not known"),
        ({"architectures": "Ernie4_5ForCausalLM"}, "not known"),
        ({"architectures": [None]}, "not known"),
    ],
    ids=str,
)
def test_other_networks_are_refused_by_a_sentence_that_says_which_run(raw: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedConfigError, match=reason) as caught:
        ErnieConfig.from_dict(raw)
    assert "ernie4_5_moe (Ernie4_5_MoeForCausalLM) and ernie4_5 (Ernie4_5ForCausalLM)" in str(caught.value)


@pytest.mark.parametrize("raw", [None, [], "x", 3])
def test_a_config_must_be_an_object(raw: Any) -> None:
    with pytest.raises(UnsupportedConfigError, match="one JSON object"):
        ErnieConfig.from_dict(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@fuzz(200)
@given(st.dictionaries(st.sampled_from(sorted([*THINKING, "head_dim", "rope_parameters", "num_experts"])), JSON))
def test_any_values_make_a_config_or_one_error(changes: dict[str, Any]) -> None:
    try:
        config = ErnieConfig.from_dict({**THINKING, **changes})
    except CheckpointError:
        return
    assert all(size > 0 for shape in parameter_shapes(config).values() for size in shape)
