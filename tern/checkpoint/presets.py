"""The shapes of known networks, for synthetic weights: what their `config.json` says. Knows no weights."""

from __future__ import annotations

from typing import Any

_FAMILY: dict[str, Any] = {
    "hidden_act": "silu",
    "vocab_size": 103424,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "use_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
_MOE: dict[str, Any] = {
    **_FAMILY,
    "model_type": "ernie4_5_moe",
    "head_dim": 128,
    "moe_num_experts": 64,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
}
_21B_A3B: dict[str, Any] = {
    **_MOE,
    "num_hidden_layers": 28,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "moe_k": 6,
    "moe_intermediate_size": 1536,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
}

PRESETS: dict[str, dict[str, Any]] = {
    "ernie-4.5-21b-a3b": _21B_A3B,
    "ernie-4.5-21b-a3b-thinking": _21B_A3B,
    "ernie-4.5-300b-a47b": {
        **_MOE,
        "num_hidden_layers": 54,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "moe_k": 8,
        "moe_intermediate_size": 3584,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 3,
        "tie_word_embeddings": False,
    },
    "ernie-4.5-0.3b": {
        **_FAMILY,
        "model_type": "ernie4_5",
        "num_hidden_layers": 18,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
    },
    # Every kind of layer in about two million parameters: for trying things out in a moment.
    "tiny": {
        **_MOE,
        "vocab_size": 8192,
        "max_position_embeddings": 8192,
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "moe_num_experts": 16,
        "moe_k": 4,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
}
