"""Multi-token prediction: one more layer that drafts the token after next. Knows hidden states; verifies nothing.

At position t, with the hidden state h_t of the decoder (after its final norm) and the token that follows it:

    h' = proj([emb_norm(embed(token_{t+1})), hidden_norm(h_t)])
    draft logits for token t+2 = head(block(h'))

The embedding of position 0 is zero. The block is a dense decoder layer with a cache of its own, and the head is the
decoder's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tern import ops
from tern.model.batch import Batch, KVCache
from tern.model.config import ErnieConfig
from tern.model.layers import DecoderLayer, Linear, Parameters, Step


class MultiTokenPredictor:
    """The MTP block. It shares `embedding` [V, H] and the rotary `frequencies` [head_dim] with the decoder."""

    def __init__(self, config: ErnieConfig, parameters: Parameters, embedding: Tensor, frequencies: Tensor) -> None:
        self.eps = config.rms_norm_eps
        self.embedding = embedding
        self.frequencies = frequencies
        self.emb_norm = parameters["emb_norm"]
        self.hidden_norm = parameters["hidden_norm"]
        self.proj = Linear(parameters.under("proj."))
        self.block = DecoderLayer(config, parameters.under("block."), moe=False)

    @torch.inference_mode()
    def hidden(self, batch: Batch, previous: Tensor, kv: KVCache) -> Tensor:
        """Draft hidden states for `ErnieModel.logits`: [tokens, hidden_size].

        Row t of `batch` stands at position t and carries the token of position t + 1; `previous` [tokens, hidden_size]
        are the decoder's hidden states at the rows' positions. `kv` is a cache of one layer, this block's own.
        """
        embedded = ops.embed(batch.token_ids, self.embedding)
        embedded = embedded.masked_fill(batch.positions[:, None] == 0, 0.0)
        joined = torch.cat(
            [
                ops.rms_norm(embedded, self.emb_norm, self.eps),
                ops.rms_norm(previous, self.hidden_norm, self.eps),
            ],
            dim=-1,
        )
        step = Step.of(batch, self.frequencies, kv)
        delta, residual = self.block(None, self.proj(joined), step, kv.keys[0], kv.values[0])
        assert isinstance(delta, Tensor), "a dense layer leaves rows"
        return residual + delta
