"""The ERNIE-4.5 decoder, from token ids to logits. Knows batches and the KV cache; knows no requests and no files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tern import ops
from tern.errors import CheckpointError
from tern.model.batch import Batch, KVCache
from tern.model.config import ErnieConfig
from tern.model.layers import DecoderLayer, Parameters, Step
from tern.model.mtp import MultiTokenPredictor
from tern.model.parameters import OPTIONAL_PARAMETERS, parameter_shapes


class ErnieModel:
    """The network of `config` over `tensors`, which map canonical names to parameters on one device, save that routed
    experts may lie packed on the CPU while the others are elsewhere.

    The tensors are used as they are, without a copy; all must be of one floating type but those of
    `float32_parameters`. `mtp` is the multi-token predictor, None if the tensors hold none.

    Raises `CheckpointError` that lists every parameter that is missing or misshapen.
    """

    def __init__(self, config: ErnieConfig, tensors: Mapping[str, ops.Weight]) -> None:
        _check(config, tensors)
        parameters = Parameters(tensors)
        self.config = config
        rounded = [weight for weight in tensors.values() if not isinstance(weight, Tensor)]
        self._quantization = rounded[0].quantization if rounded else None
        experts = [weight for name, weight in tensors.items() if name.endswith(".moe.down")]
        self._is_split = any(isinstance(weight, ops.PackedWeight) for weight in experts) and not isinstance(
            tensors["layers.0.attn.qkv.weight"], ops.PackedWeight
        )
        self.embedding = parameters["embed"]
        self.layers = [
            DecoderLayer(config, parameters.under(f"layers.{layer}."), moe=config.is_moe_layer(layer))
            for layer in range(config.num_hidden_layers)
        ]
        self.norm = parameters["norm"]
        self.head = parameters.weight("head") if "head" in tensors else self.embedding
        self.head_bias = parameters["head.bias"] if config.has_head_bias else None
        self.frequencies = ops.rotary_frequencies(config.head_dim, config.rope_theta, self.device)
        self.mtp = (
            MultiTokenPredictor(config, parameters.under("mtp."), self.embedding, self.frequencies)
            if "mtp.proj.weight" in tensors
            else None
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and activations."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights live and the inputs must be."""
        return self.embedding.device

    @property
    def quantization(self) -> str | None:
        """What the weights are rounded to, or failing those the experts: wint4, wint8, fp8 or block_wise_fp8."""
        return self._quantization

    @property
    def is_split(self) -> bool:
        """Whether the routed experts lie on the CPU and all else elsewhere; a step then waits for the host."""
        return self._is_split

    @torch.inference_mode()
    def hidden(self, batch: Batch, kv: KVCache) -> Tensor:
        """Run the step's tokens through all layers -> hidden states after the final norm, [tokens, hidden_size].

        Their keys and values are written into `kv` at the batch's slots.
        """
        step = Step.of(batch, self.frequencies, kv)
        delta: ops.Delta | None = None
        residual = ops.embed(batch.token_ids, self.embedding)
        for layer, key_cache, value_cache in zip(self.layers, kv.keys, kv.values, strict=True):
            delta, residual = layer(delta, residual, step, key_cache, value_cache)
        return ops.add_rms_norm(delta, residual, self.norm, self.config.rms_norm_eps)[0]

    @torch.inference_mode()
    def logits(self, hidden_rows: Tensor) -> Tensor:
        """Next-token logits of rows of `hidden` (or of the MTP's): [rows, hidden_size] -> [rows, vocab] float32."""
        return ops.linear(hidden_rows, self.head, self.head_bias).float()


def _check(config: ErnieConfig, tensors: Mapping[str, ops.Weight]) -> None:
    """Raise unless `tensors` hold what `config` needs; MTP may be absent as a whole."""
    shapes = parameter_shapes(config)
    if "head" in tensors:  # tied embeddings may have a packed copy for the head
        shapes.setdefault("head", shapes["embed"])
    if not any(name.startswith("mtp.") for name in tensors):
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("mtp.")}
    problems = []
    for name, shape in shapes.items():
        if name not in tensors:
            if name not in OPTIONAL_PARAMETERS:
                problems.append(f"{name} {list(shape)} is missing")
        elif tuple(tensors[name].shape) != shape:
            problems.append(f"{name} has shape {list(tensors[name].shape)} instead of {list(shape)}")
    if problems:
        raise CheckpointError("These parameters do not fit the network of the config:", problems=problems)
