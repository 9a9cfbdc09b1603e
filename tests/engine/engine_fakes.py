"""Stand-ins for the engine's tests: a model that is a pure function of its context, and a sink that remembers all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from tern.engine import CONTINUE, Engine, EngineOptions, Finish, GeneratedToken, Request, SamplingParams, Steering
from tern.engine.block_pool import CachedBlock
from tern.engine.graphs import Compute
from tern.model.batch import Batch, KVCache

VOCAB = 61
EOS = 2
LENGTH = 96


class HashModel:
    """Logits that depend on every token of the context and its position, read back through the block tables.

    Its "keys" are the tokens themselves and its "values" their positions, so any slot that is written wrongly, read
    before it is written or taken from a stale block changes the answer or raises.
    """

    def __init__(self, vocab_size: int = VOCAB, length: int = LENGTH) -> None:
        self.config: Any = SimpleNamespace(
            vocab_size=vocab_size,
            max_position_embeddings=length,
            hidden_size=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=1,
        )
        self.mtp: Any = None
        self.quantization: str | None = None
        self.is_split = False
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.table = torch.randn(8191, vocab_size, generator=torch.Generator().manual_seed(5))
        self.batches: list[Batch] = []
        self.kv: KVCache | None = None  # the cache of the newest step
        self.fail_next = 0
        self.poison_token: int | None = None  # a batch that contains it fails
        self.spoil_token: int | None = None  # a context that contains it gives logits that are not finite

    def hidden(self, batch: Batch, kv: KVCache) -> torch.Tensor:
        self.batches.append(batch)
        self.kv = kv
        if self.fail_next:
            self.fail_next -= 1
            raise RuntimeError("the fake model fails as asked")
        size = kv.block_size
        kv.keys.view(-1)[batch.slots] = batch.token_ids.float()
        kv.values.view(-1)[batch.slots] = batch.positions.float()
        if self.poison_token in batch.token_ids.tolist():
            raise RuntimeError("the fake model chokes on the poison")
        rows = []
        starts = batch.query_starts.tolist()
        for index, context_len in enumerate(batch.context_lens.tolist()):
            slots = (batch.block_tables[index][:, None] * size + torch.arange(size)).view(-1)[:context_len]
            tokens, positions = kv.keys.view(-1)[slots], kv.values.view(-1)[slots]
            assert positions.tolist() == list(range(context_len)), "the cache holds other positions than it should"
            count = starts[index + 1] - starts[index]
            assert batch.positions[starts[index] : starts[index + 1]].tolist() == list(
                range(context_len - count, context_len)
            )
            read = tokens.long().tolist()
            for end in range(context_len - count + 1, context_len + 1):
                rows.append(-1 if self.spoil_token in read[:end] else hash_context(read[:end]))
        return torch.tensor(rows, dtype=self.dtype)[:, None]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        keys = hidden[:, 0].long()
        logits = self.table[keys.clamp(min=0)].clone()
        logits[keys < 0] = float("nan")
        return logits


class HashPredictor:
    """The multi-token predictor of a `HashModel`: always right, as long as it is shown every position.

    Its "keys" are the tokens it was given, which are those of the positions after; the first it reads where the
    decoder has it.
    """

    def __init__(self, model: HashModel) -> None:
        self.model = model

    def hidden(self, batch: Batch, previous: torch.Tensor, kv: KVCache) -> torch.Tensor:
        assert len(previous) == len(batch.token_ids)
        assert self.model.kv is not None
        size = kv.block_size
        kv.keys.view(-1)[batch.slots] = batch.token_ids.float()
        kv.values.view(-1)[batch.slots] = batch.positions.float()
        rows = []
        starts = batch.query_starts.tolist()
        for index, context_len in enumerate(batch.context_lens.tolist()):
            if not context_len:  # a graph has room for more sequences
                continue
            slots = (batch.block_tables[index][:, None] * size + torch.arange(size)).view(-1)[:context_len]
            assert kv.values.view(-1)[slots].tolist() == list(range(context_len)), "a position was not shown"
            first = int(self.model.kv.keys.view(-1)[slots[0]])
            read = [first, *kv.keys.view(-1)[slots].long().tolist()]
            count = starts[index + 1] - starts[index]
            rows += [hash_context(read[: end + 2]) for end in range(context_len - count, context_len)]
        return torch.tensor(rows, dtype=self.model.dtype)[:, None]


@dataclass
class FixedTimes:
    """Step times that do not depend on a clock, so that neither does what is drafted; drafts are free without another
    wish for `seconds(rows)`."""

    seconds: Callable[[int], float] = lambda _: 1.0

    def add(self, sequences: int, rows: int, seconds: float) -> None:
        """Measured times do not count."""

    def known(self, sequences: int) -> bool:
        return sequences > 0

    def curve(self, sequences: int) -> Callable[[int], float]:
        return lambda rows: self.seconds(rows - sequences + 1)


def hash_context(tokens: list[int]) -> int:
    """A number below 8191 that depends on every token and its place."""
    value = 17
    for token in tokens:
        value = (value * 1_000_003 + token + 1) % 2_147_483_647
    return value % 8191


@dataclass
class Recorder:
    """A sink that keeps what it is given. `script` maps a count of pushed tokens to an answer."""

    script: dict[int, Steering] = field(default_factory=dict)
    tokens: list[GeneratedToken] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    raise_at: int | None = None
    raise_at_end: bool = False

    def push(self, token: GeneratedToken) -> Steering:
        assert not self.finishes, "a token after the end"
        self.tokens.append(token)
        if self.raise_at == len(self.tokens):
            raise ValueError("the sink fails as asked")
        return self.script.get(len(self.tokens), CONTINUE)

    def finish(self, finish: Finish) -> None:
        self.finishes.append(finish)
        if self.raise_at_end:
            raise ValueError("the sink fails at its end as asked")

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def end(self) -> Finish:
        assert len(self.finishes) == 1, f"finished {len(self.finishes)} times"
        return self.finishes[0]


@dataclass
class MemoryStore:
    """A `BlockStore` that keeps what it is offered, with the bytes of `kv` where there is one, and notes every call.

    Content must not change between its offer and the reuse of its block.
    """

    kv: KVCache | None = None
    kept: dict[bytes, tuple[CachedBlock, bytes]] = field(default_factory=dict)
    places: dict[bytes, int] = field(default_factory=dict)
    calls: list[tuple[str, list[int]]] = field(default_factory=list)  # blocks

    def offer(self, blocks: Iterable[tuple[int, CachedBlock]]) -> None:
        offered = list(blocks)
        self.calls.append(("offer", [block for block, _ in offered]))
        for block, content in offered:
            assert content.parent is None or content.parent in self.kept, "offered before the one before it"
            self.kept.setdefault(content.digest, (content, self._bytes(block)))
            self.places[content.digest] = block

    def rescue(self, contents: Iterable[CachedBlock]) -> None:
        blocks = [self.places.pop(content.digest) for content in contents]
        self.calls.append(("rescue", blocks))
        for block, content in zip(blocks, contents, strict=True):
            assert self.kept[content.digest] == (content, self._bytes(block)), "reused before it was saved"

    def remove(self, contents: Iterable[CachedBlock]) -> None:
        for content in contents:
            del self.kept[content.digest], self.places[content.digest]

    def restore(self, blocks: Iterable[tuple[int, CachedBlock]]) -> int:
        filled = []
        for block, content in blocks:
            if content.digest not in self.kept:
                break
            known, data = self.kept[content.digest]
            assert known == content
            if self.kv is not None:
                self.kv.fill_block(block, memoryview(bytearray(data)))
            filled.append(block)
        self.calls.append(("restore", filled))
        return len(filled)

    def _bytes(self, block: int) -> bytes:
        if self.kv is None:
            return b""
        data = memoryview(bytearray(self.kv.block_bytes))
        self.kv.copy_block(block, data)
        return bytes(data)


class StandInGraphs:
    """Captures as a GPU does, without one: outputs lie where they lay at the capture, and each replay ruins those of
    the other graphs, whose memory it shares."""

    def __init__(self) -> None:
        self.outputs: list[torch.Tensor] = []
        self.replays = 0

    def __call__(self, compute: Compute) -> Compute:
        mine = compute().clone()
        self.outputs.append(mine)

        def replay() -> torch.Tensor:
            self.replays += 1
            found = compute()
            for output in self.outputs:
                output.fill_(float("nan"))
            return mine.copy_(found)

        return replay


def make_engine(model: Any = None, *, graphs: StandInGraphs | None = None, **options: Any) -> Engine:
    """A small engine; without another wish 4-token blocks for four full sequences, and no `graphs`."""
    values: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 96, "max_num_seqs": 8, "max_num_batched_tokens": 32}
    values |= {"speculation": "off", "target_step_seconds": None}  # or steps would depend on how long they take
    with patch("tern.engine.engine.capture_for", lambda *_, **__: graphs):
        return Engine(model or HashModel(), {EOS}, EngineOptions.from_keywords(**{**values, **options}))


def make_request(request_id: str, prompt: list[int], *, sink: Recorder | None = None, **fields: Any) -> Request:
    """A request whose other keywords go to `SamplingParams`, or to the request where they belong there."""
    own = {
        name: fields.pop(name)
        for name in ("priority", "cache_salt", "choice_index", "bad_token_sequences", "grammar")
        if name in fields
    }
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **fields})
    return Request(request_id, tuple(prompt), params, sink or Recorder(), **own)


def add(engine: Engine, request_id: str, prompt: list[int], **fields: Any) -> Recorder:
    """Add a request with a recording sink, and return the sink."""
    request = make_request(request_id, prompt, **fields)
    engine.add(request)
    assert isinstance(request.sink, Recorder)
    return request.sink


def run(engine: Engine, limit: int = 2000) -> int:
    """Step until idle, checking the books after every step; returns the number of steps."""
    for steps in range(limit):
        if not engine.step():
            assert not engine.has_work, "the engine idles although requests are open"
            return steps
        engine.check_integrity()
    raise AssertionError(f"still busy after {limit} steps")
