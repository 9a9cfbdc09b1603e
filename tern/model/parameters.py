"""The canonical names and shapes of a network's parameters. Knows no files and no other layout's names.

Fused where one multiplication serves: queries, keys and values are one weight, so are gate and up, and the experts of a
layer are stacked. Linear weights are `[out, in]`.
"""

from __future__ import annotations

from tern.model.config import ErnieConfig

Shapes = dict[str, tuple[int, ...]]

# Present in some checkpoints of a config and absent in others, with the same meaning.
OPTIONAL_PARAMETERS = frozenset({"mtp.proj.bias"})


def parameter_shapes(config: ErnieConfig) -> Shapes:
    """Every parameter of the network: canonical name -> shape.

    The names under `mtp.` are listed when the config announces MTP (`num_nextn_predict_layers`); a checkpoint may lack
    all of them.
    """
    hidden = config.hidden_size
    shapes: Shapes = {"embed": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= _layer(f"layers.{layer}.", config, moe=config.is_moe_layer(layer))
    shapes["norm"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["head"] = (config.vocab_size, hidden)
    if config.has_head_bias:
        shapes["head.bias"] = (config.vocab_size,)
    if config.num_nextn_predict_layers > 0:
        shapes |= {"mtp.emb_norm": (hidden,), "mtp.hidden_norm": (hidden,)}
        shapes |= _linear("mtp.proj", 2 * hidden, hidden, bias=config.use_bias)
        shapes |= _layer("mtp.block.", config, moe=False)
    return shapes


def float32_parameters(config: ErnieConfig) -> frozenset[str]:
    """The parameters that stay float32 whatever the network's dtype: the routers and their correction biases.

    Routing in bf16 picks other experts than the model was trained with.
    """
    return frozenset(
        f"layers.{layer}.moe.{name}"
        for layer in range(config.num_hidden_layers)
        if config.is_moe_layer(layer)
        for name in ("router", "correction_bias")
    )


def _layer(prefix: str, config: ErnieConfig, *, moe: bool) -> Shapes:
    """One decoder layer: attention, then a dense or a routed feed-forward part."""
    hidden, bias = config.hidden_size, config.use_bias
    query_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    shapes: Shapes = {f"{prefix}attn_norm": (hidden,)}
    shapes |= _linear(f"{prefix}attn.qkv", hidden, query_width + 2 * kv_width, bias=bias)
    shapes |= _linear(f"{prefix}attn.o", query_width, hidden, bias=bias)
    shapes[f"{prefix}mlp_norm"] = (hidden,)
    if moe:
        return shapes | _experts(f"{prefix}moe.", config)
    return shapes | _swiglu(f"{prefix}mlp.", hidden, config.intermediate_size, bias=bias)


def _experts(prefix: str, config: ErnieConfig) -> Shapes:
    """The routed experts, which have no bias, and the shared ones, which are one SwiGLU and may have one."""
    experts, hidden, width = config.moe_num_experts, config.hidden_size, config.moe_intermediate_size
    shapes: Shapes = {
        f"{prefix}router": (experts, hidden),
        f"{prefix}correction_bias": (experts,),
        f"{prefix}gate_up": (experts, 2 * width, hidden),
        f"{prefix}down": (experts, hidden, width),
    }
    if config.moe_num_shared_experts > 0:
        shared_width = config.moe_num_shared_experts * width
        shapes |= _swiglu(f"{prefix}shared.", hidden, shared_width, bias=config.use_bias)
    return shapes


def _swiglu(prefix: str, hidden: int, width: int, *, bias: bool) -> Shapes:
    return _linear(f"{prefix}gate_up", hidden, 2 * width, bias=bias) | _linear(
        f"{prefix}down", width, hidden, bias=bias
    )


def _linear(name: str, inputs: int, outputs: int, *, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": (outputs, inputs)}
    return weight | {f"{name}.bias": (outputs,)} if bias else weight
