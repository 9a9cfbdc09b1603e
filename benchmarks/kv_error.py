"""What int8 and bfloat16 KV caches change in the answers of a model, beside a float32 cache.

    python -m benchmarks.kv_error --model DIR --text FILE

The whole text is read once with each cache. Stated are the relative error of the last hidden states, the mean
divergence of the next token's distribution in nats, and how often the likeliest token is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tern.chat import ChatProtocol
from tern.checkpoint import load_model, resolve_model
from tern.errors import TernError
from tern.model import Batch, ErnieModel, KVCache

BLOCK_SIZE = 16
CACHES = (torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class CacheError:
    """One cache's `hidden` error, `divergence` in nats and share of positions with the `same_token`."""

    hidden: float
    divergence: float
    same_token: float


@torch.inference_mode()
def measure(model: ErnieModel, token_ids: Sequence[int]) -> dict[torch.dtype, CacheError]:
    """Read the tokens with every cache."""
    truth = _hidden(model, token_ids, torch.float32)
    expected = model.logits(truth).log_softmax(-1)
    errors = {}
    for dtype in CACHES:
        hidden = _hidden(model, token_ids, dtype)
        found = model.logits(hidden).log_softmax(-1)
        divergence = (expected.exp() * (expected - found)).sum(-1).mean()
        same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
        distance = (hidden.float() - truth.float()).norm() / truth.float().norm()
        errors[dtype] = CacheError(distance.item(), divergence.item(), same.item())
    return errors


def _hidden(model: ErnieModel, token_ids: Sequence[int], dtype: torch.dtype) -> Tensor:
    count = len(token_ids)
    blocks = -(-count // BLOCK_SIZE)
    sizes = {"num_blocks": blocks, "block_size": BLOCK_SIZE}
    kv = KVCache.allocate(model.config, **sizes, dtype=dtype, device=model.device)
    everything = torch.arange(count)
    batch = Batch(
        token_ids=torch.tensor(token_ids),
        positions=everything,
        slots=everything,
        query_starts=torch.tensor([0, count]),
        context_lens=torch.tensor([count]),
        block_tables=torch.arange(blocks)[None],
        logit_rows=everything,
        max_query_len=count,
        max_context_len=count,
    )
    return model.hidden(batch, kv)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    made = argparse.ArgumentParser(description="Errors of bfloat16 and int8 KV caches.")
    made.add_argument("--model", help="a directory or GGUF file; the embedded model without it")
    made.add_argument("--text", type=Path, required=True, help="what is read")
    made.add_argument("--tokens", type=int, default=2000, help="at most so many of it")
    wanted = made.parse_args(arguments)
    try:
        source = resolve_model(wanted.model)
        tokenizer = ChatProtocol.from_directory(source.directory, source.text_files).tokenizer
        token_ids = tokenizer.encode(wanted.text.read_text(encoding="utf-8"))[: wanted.tokens]
        errors = measure(load_model(source), token_ids)
    except (OSError, TernError) as error:
        made.exit(2, f"{error}\n")
    for dtype, found in errors.items():
        print(
            f"{str(dtype).removeprefix('torch.'):8}  hidden states {found.hidden:.2%}, divergence "
            f"{found.divergence:.1e} nats, same token {found.same_token:.2%} of {len(token_ids)}"
        )


if __name__ == "__main__":
    main()
