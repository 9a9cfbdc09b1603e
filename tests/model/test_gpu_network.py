"""The whole network by a GPU's kernels beside the same network on the processor: prefill, decode, and both in a step.

Every operation that has a kernel goes through it, interpreted where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from tern.checkpoint.quantisation import packed_bits
from tern.model import Batch, ErnieConfig, ErnieModel
from tern.ops import Weight, round_to_fp8
from tern.ops.placement import interpreted
from tests.compare import assert_close
from tests.model.ernie_fixtures import Driver, PagedSequence, canonical_tensors, transformers_model

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

pytestmark = pytest.mark.gpu
SIZES = {"num_hidden_layers": 2, "hidden_size": 80, "num_attention_heads": 10, "num_key_value_heads": 2}
PROMPT = torch.randint(0, 199, (40,), generator=torch.Generator().manual_seed(2)).tolist()
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


class DeviceDriver(Driver):
    """A driver whose batches lie on the model's device."""

    def batch(self, chunks: list[tuple[PagedSequence, list[int]]]) -> Batch:
        made = super().batch(chunks)
        tensors = {field.name: getattr(made, field.name) for field in fields(made)}
        return replace(
            made,
            **{name: value.to(self.model.device) for name, value in tensors.items() if isinstance(value, Tensor)},
        )


def network(moe: bool, dtype: torch.dtype, device: torch.device, *, fp8: bool = False) -> ErnieModel:
    theirs = transformers_model(moe, seed=4, use_bias=not moe, **SIZES)
    config = ErnieConfig.from_dict(theirs.config.to_dict())
    wide = ("router", "correction_bias")
    tensors: dict[str, Weight] = {}
    for name, tensor in canonical_tensors(config, theirs.state_dict()).items():
        if fp8 and packed_bits(name, "fp8") is not None:
            tensors[name] = round_to_fp8(tensor, block_wise=True).to(device)
        else:
            tensors[name] = tensor.to(device, torch.float32 if name.endswith(wide) else dtype)
    return ErnieModel(config, tensors)


def steps(model: ErnieModel) -> Iterator[Tensor]:
    """The hidden states of one step after the other."""
    driver = DeviceDriver(model, block_size=16)
    first, second, third = (driver.sequence(40) for _ in range(3))
    yield driver.hidden([(first, PROMPT[:33]), (second, PROMPT[:3])])
    yield driver.hidden([(first, PROMPT[33:34]), (second, PROMPT[3:4])])
    yield driver.hidden([(second, PROMPT[4:5]), (third, PROMPT[:20]), (first, PROMPT[34:35])])
    yield driver.hidden([(first, PROMPT[35:38]), (third, PROMPT[20:22])])


@pytest.mark.parametrize(("moe", "dtype"), [(True, torch.float32), (False, torch.bfloat16)], ids=str)
def test_every_step_is_that_of_the_processor(moe: bool, dtype: torch.dtype) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected = list(steps(network(moe, dtype, torch.device("cpu"))))
    with interpreted():
        found = list(steps(network(moe, dtype, device)))
    for step, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
        assert ours.dtype == dtype, step
        assert_close(ours.cpu().float(), theirs.float(), tolerance=TOLERANCES[dtype])


def test_norms_round_to_fp8_what_products_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, and fewer rows are then rounded by themselves."""
    from tern.ops.cuda import products

    rounded: list[int] = []
    original = products.round_rows_to_fp8
    monkeypatch.setattr(products, "round_rows_to_fp8", lambda x: rounded.append(x.shape[1]) or original(x))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = network(True, torch.bfloat16, device, fp8=True)
    assert [(layer.attention.form, layer.mlp.form) for layer in model.layers] == [("fp8", "fp8"), ("fp8", "both")]
    with interpreted():
        found, few = list(steps(model)), len(rounded)
        for layer in model.layers:
            layer.attention.form = layer.mlp.form = "plain"
        for ours, alone in zip(found, steps(model), strict=True):
            assert torch.equal(ours, alone)
    assert len(rounded) - few >= few + 4 * len(found)  # two norms a layer


def test_the_kernels_are_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above would pass too if the processor computed both."""
    from tern.ops import cuda

    seen: list[str] = []
    for name in cuda.__all__:
        original = getattr(cuda, name)
        if isinstance(original, type):
            continue

        def watched(*arguments: object, name: str = name, original: object = original, **rest: object) -> object:
            seen.append(name)
            return original(*arguments, **rest)  # type: ignore[operator]

        monkeypatch.setattr(cuda, name, watched)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with interpreted():
        next(steps(network(False, torch.float32, device)))
    assert {"add_rms_norm", "attend"} <= set(seen)
