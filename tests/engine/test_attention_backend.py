"""How the option `attention_backend` reaches the steps: which have chunks for the library, and what is refused."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_fakes import HashModel, add, make_engine, run

from tern import ops
from tern.checkpoint import resolve_model
from tern.engine import Engine, EngineOptions
from tern.engine.options import ATTENTION_BACKENDS
from tern.errors import OptionError
from tern.ops import attention_libraries
from tern.ops.placement import interpreted


class Nobody:
    """A library that is handed to the steps; the network here computes no attention."""

    name = "nobody"

    def attend(self, *_: object) -> None:
        raise AssertionError("never called")


def serve(engine: Engine) -> list[list[int]]:
    sinks = [
        add(engine, str(length), list(range(3, 3 + length)), max_tokens=5, ignore_eos=True) for length in (1, 9, 50)
    ]
    run(engine)
    return [sink.ids for sink in sinks]


def test_chunks_are_handed_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    library, model = Nobody(), HashModel()
    monkeypatch.setattr("tern.engine.engine._attention", lambda *_: library)
    assert serve(make_engine(model)) == serve(make_engine())
    with_chunks = [batch for batch in model.batches if batch.chunks is not None]
    assert 0 < len(with_chunks) < len(model.batches)
    for batch in model.batches:
        lengths = batch.query_starts.diff()
        assert (batch.chunks is None) == (lengths.max() == 1)
        if batch.chunks is not None:
            assert batch.chunks.library is library
            assert batch.chunks.lengths.tolist() == lengths[batch.chunks.sequences].tolist()
            contexts = torch.where(lengths > 1, batch.context_lens, 1)
            assert batch.chunks.contexts.tolist() == contexts[batch.chunks.sequences].tolist()


def test_what_the_network_asks_of_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU alone; there by the sizes of the model and the type of the cache."""
    asked: list[tuple[str, ops.AttentionWork]] = []
    monkeypatch.setattr(ops, "choose_attention", lambda *given: asked.append(given))
    from tern.engine.engine import _attention

    config = SimpleNamespace(num_attention_heads=20, num_key_value_heads=4, head_dim=128)
    model: Any = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16, config=config)
    options = EngineOptions(block_size=32, kv_cache_dtype="fp8")
    assert _attention(model, options, torch.float8_e4m3fn) is None
    assert not asked
    with interpreted():
        _attention(model, options, torch.float8_e4m3fn)
    sizes = (model.device, 20, 4, 128, torch.bfloat16, torch.float8_e4m3fn, 32)
    assert asked == [("auto", ops.AttentionWork(*sizes))]


@pytest.mark.parametrize("name", ["flash-attn", "flashinfer"])
def test_a_library_is_refused_on_a_processor_before_weights_are_read(name: str) -> None:
    words = f"attention_backend is '{name}', but the device is cpu"
    with pytest.raises(OptionError, match=words):
        Engine.open(
            resolve_model(None), EngineOptions(attention_backend=name, device="cpu", num_kv_blocks=10), progress=False
        )
    with pytest.raises(OptionError, match=words):
        make_engine(attention_backend=name)
    assert not {"flash_attn_interface", "flashinfer"} & sys.modules.keys()


def test_the_option_has_a_name_for_each_library() -> None:
    """It names them itself, because options are read without torch."""
    assert ("auto", "tern", *attention_libraries._LIBRARIES) == ATTENTION_BACKENDS
