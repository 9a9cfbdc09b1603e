"""The launches of a step on a Hopper GPU, in order, without a GPU: nothing is computed, and tensors have no memory.

The engine's runner packs a step, calls the network and begins to sample, over tensors on torch's "meta" device, with
torch made to say that there is a Hopper GPU. Every launch of a Triton kernel is written down instead of made, and so is
every operation of torch that would launch one or copy. Knows no tiles and no names of kernels.

A process that has called `pretend_hopper` is of no use for anything else: import `tern.ops.cuda` after it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_plan import CACHE_DTYPES, Row
from tern.bench.gpu import weight_sizes
from tern.bench.overhead import ROOM
from tern.bench.report import BLOCK_SIZE
from tern.engine import CONTINUE, Finish, GeneratedToken, Request, SamplingParams, Steering
from tern.engine.graphs import Compute
from tern.engine.runner import Runner
from tern.engine.sampling_state import SamplingState
from tern.engine.scheduler import Chunk
from tern.engine.sequence import Sequence as EngineSequence
from tern.model import ErnieConfig, ErnieModel, KVCache
from tern.model.layers import DecoderLayer
from tern.ops import Weight, transfer
from tern.ops.placement import interpreted

HOPPER = (9, 0)

# Operations of torch that give a tensor and launch nothing.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach", "detach_"}


def pretend_hopper() -> None:
    """Let torch say from now on that there is a Hopper GPU, and Triton compile for one."""
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: HOPPER
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Hopper:
        """As much of a driver as compiling asks for."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return device

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 10 * HOPPER[0] + HOPPER[1], 32)

    driver.set_active(Hopper())


class Address:
    """What Triton reads of a tensor when it compiles: its type and how its address is aligned."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._place = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        """Its place in an allocation, which begins at a multiple of 512 bytes."""
        return self._place


@dataclass(frozen=True)
class Call:
    """A launch of a Triton kernel as it was asked for: what compiling it takes."""

    function: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Launch:
    """One launch: of a Triton kernel, which has a `call` and a `grid`, or of an operation of torch.

    `shapes` are those of its tensors. `read_bytes`: of weights and of the cache; the activations are in the GPU's own
    cache. `layer` None: it belongs to no layer. `in_graph`: a CUDA graph would replay it.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    read_bytes: float
    layer: int | None
    in_graph: bool
    grid: tuple[int, ...] | None = None
    call: Call | None = field(default=None, compare=False)

    @property
    def programs(self) -> int:
        """Of a Triton kernel."""
        return math.prod(self.grid or ())


@dataclass(frozen=True)
class Traffic:
    """What a launch reads of tensors that outlive it: of stacked weights the `chosen` share, and of the cache
    `cached_tokens` of all sequences together, `cached_width` numbers each. `weights`, `cache`: storages; `seen`:
    weights that were counted, which a later launch only names.
    """

    weights: frozenset[int]
    cache: frozenset[int]
    experts: int
    chosen: float
    sequences: int
    cached_tokens: int
    cached_width: int
    seen: set[int] = field(default_factory=set)

    @classmethod
    def of_step(cls, model: ErnieModel, weights: Iterable[Weight], kv: KVCache, row: Row) -> Traffic:
        """That of a row's steps."""
        config, rows = model.config, row.sequences * row.tokens
        share = config.moe_k / config.moe_num_experts if config.moe_num_experts else 0.0
        return cls(
            frozenset(_storage(tensor) for weight in weights for tensor in _parts(weight)),
            frozenset((_storage(kv.keys), _storage(kv.values))),
            config.moe_num_experts,
            1.0 - (1.0 - share) ** rows,
            row.sequences,
            row.sequences * (row.depth + row.tokens),
            config.num_key_value_heads * config.head_dim,
        )

    def read_bytes(self, tensors: Sequence[Tensor]) -> float:
        """Bytes that a launch with these tensors reads; of the cache only where it has block tables too."""
        tables = any(x.dim() == 2 and len(x) == self.sequences and not x.is_floating_point() for x in tensors)
        found = sum(self._of_one(x, tables=tables) for x in {_storage(x): x for x in tensors}.values())
        self.seen.update(map(_storage, tensors))
        return found

    def _of_one(self, x: Tensor, *, tables: bool) -> float:
        storage = _storage(x)
        if storage in self.cache:
            return float(self.cached_tokens * self.cached_width * x.element_size()) if tables else 0.0
        if storage not in self.weights or storage in self.seen:
            return 0.0
        stacked = x.dim() == 3 and len(x) == self.experts
        return x.nbytes * (self.chosen if stacked else 1.0)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down launches in order while it is entered and `launch` stands for `JITFunction.run`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []
        self.traffic: Traffic | None = None
        self.layer: int | None = None
        self.in_graph = False

    def note(self, name: str, tensors: Sequence[Tensor], **rest: Any) -> None:
        """Add a launch with these tensors."""
        assert self.traffic is not None
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        read = self.traffic.read_bytes(tensors)
        self.launches.append(Launch(name, shapes, read, self.layer, self.in_graph, **rest))

    def launch(self, function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:  # noqa: ARG002
        """In the place of `JITFunction.run`."""
        named = dict(zip(function.arg_names, arguments, strict=False)) | options
        tensors = [value for value in named.values() if isinstance(value, Tensor)]
        call = Call(function, tuple(map(_address, arguments)), {name: _address(x) for name, x in options.items()})
        sizes = tuple(int(size) for size in (grid(named) if callable(grid) else grid))
        self.note(function.__name__, tensors, grid=sizes, call=call)

    def capture(self, compute: Compute) -> Compute:
        """In the place of a CUDA graph: what is computed each time, and known to be of the graph."""

        def replay() -> Tensor:
            self.in_graph = True
            try:
                return compute()
            finally:
                self.in_graph = False

        return replay

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Write down what is launched inside the block."""
        from triton.runtime.jit import JITFunction

        layers: dict[int, int] = {}
        call_layer, begin_copy = DecoderLayer.__call__, transfer.Arrival.__init__

        def layer(self_: DecoderLayer, *arguments: Any) -> Any:
            self.layer = layers.setdefault(id(self_), len(layers))
            try:
                return call_layer(self_, *arguments)
            finally:
                self.layer = None

        def copy_to_host(self_: transfer.Arrival, tensor: Tensor) -> None:
            self.note("copy to the host", [tensor])
            begin_copy(self_, tensor)

        with (
            patch.object(JITFunction, "run", lambda *arguments, **options: self.launch(*arguments, **options)),
            patch.object(DecoderLayer, "__call__", layer),
            patch.object(transfer.Arrival, "__init__", copy_to_host),
            self,
        ):
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _consists_of_others(func):
            with self:  # which are written down
                made = func.decompose(*args, **(kwargs or {}))
            if made is not NotImplemented:
                return made
        made = func(*args, **(kwargs or {}))
        inputs = _tensors(args)
        devices = {tensor.device.type for tensor in (*inputs, *_tensors(made))}
        name = func.overloadpacket.__name__
        if "meta" in devices and not func.is_view and name not in _FREE:
            self._note_operation(name, inputs, from_host="cpu" in devices and name in ("copy_", "_to_copy"))
        return made

    def _note_operation(self, name: str, inputs: list[Tensor], *, from_host: bool) -> None:
        if from_host and not inputs[-1].numel():
            return
        # A look-up reads rows of its table, not the table.
        self.note("copy from the host" if from_host else f"torch {name}", inputs[name == "embedding" :])


def _consists_of_others(func: Any) -> bool:
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CompositeImplicitAutograd)
    )


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _parts(weight: Weight) -> list[Tensor]:
    return [weight] if isinstance(weight, Tensor) else _tensors(list(vars(weight).values()))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _address(value: Any) -> Any:
    return Address(value) if isinstance(value, Tensor) else value


class _Unread:
    """Whom no token reaches, since none is ever read."""

    def push(self, token: GeneratedToken) -> Steering:  # noqa: ARG002
        return CONTINUE

    def finish(self, finish: Finish) -> None:
        pass


def step_launches(config: ErnieConfig, row: Row) -> list[Launch]:
    """The launches of one step of a decode or a prefill, with a greedy token for each sequence.

    A decode is one that is begun beside the one before it, as an engine in its stride does, and chooses the tokens of
    that one.
    """
    recorder = Recorder()
    with interpreted():  # which is to say: by the kernels, on whatever device
        weights: dict[str, Any] = weight_sizes(config, row.quantization)
        model = ErnieModel(config, weights)
        runner = _runner(model, row, recorder)
        recorder.traffic = Traffic.of_step(model, weights.values(), runner.kv, row)
        sequences = [_sequence(config, row, number) for number in range(row.sequences)]
        chunks = [Chunk(sequence, row.tokens, samples=True) for sequence in sequences]
        with recorder.recording(), torch.inference_mode():
            before = runner.begin(chunks) if row.kind == "decode" else None
            recorder.launches.clear()
            recorder.traffic.seen.clear()
            begun = runner.begin(chunks, after=before)
            if before is None:
                assert begun.logits is not None
                runner.sampler.begin(begun.logits, sequences)
    return recorder.launches


def _runner(model: ErnieModel, row: Row, recorder: Recorder) -> Runner:
    """What computes the row's steps, as `benchmarks.gpu` sizes it."""
    most = row.sequences * (row.depth + row.tokens + BLOCK_SIZE)
    blocks = -(-most // BLOCK_SIZE) + row.sequences * (ROOM // BLOCK_SIZE + 1)
    return Runner(
        model,
        num_blocks=blocks,
        block_size=BLOCK_SIZE,
        kv_dtype=CACHE_DTYPES[row.kv_cache_dtype],
        max_num_seqs=row.sequences,
        max_model_len=min(model.config.max_position_embeddings, blocks * BLOCK_SIZE),
        capture=recorder.capture,
    )


def _sequence(config: ErnieConfig, row: Row, number: int) -> EngineSequence:
    """A sequence whose newest `row.tokens` tokens are to be computed, in blocks of its own."""
    length = row.depth + row.tokens
    request = Request(f"review-{number}", (3,) * length, SamplingParams(temperature=0.0), _Unread())
    sequence = EngineSequence(
        request,
        max_length=config.max_position_embeddings,
        stop_ids=frozenset(),
        sampling=SamplingState(request, frozenset()),
    )
    sequence.num_computed_tokens = row.depth
    blocks = -(-(length + 1) // BLOCK_SIZE)
    sequence.block_table = array("q", range(number * blocks, (number + 1) * blocks))
    return sequence
