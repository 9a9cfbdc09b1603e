"""The engine on the real network with random weights: the same greedy answer however it is computed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fakes import add, run

from tern.checkpoint import GenerationConfig, ModelSource
from tern.checkpoint.quantisation import ROUTED_EXPERTS, pack_parameter, pack_tied_head
from tern.engine import Engine, EngineOptions, FinishReason
from tern.errors import OptionError
from tern.model import Batch, ErnieConfig, ErnieModel, KVCache, float32_parameters, parameter_shapes

VOCAB = 320
LENGTH = 160
ANSWER = 24
EOS = 2

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "use_bias": False,
}
EXPERTS = {
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_intermediate_size": 32,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
}
PROMPTS = [
    [5, 6, 7],
    list(range(10, 60)),
    [*range(10, 58), 7, 7, 9],
    [9],
    [(number * 37) % 300 + 3 for number in range(100)],
]


@lru_cache
def network(architecture: str) -> ErnieModel:
    """A network of random weights, large enough for answers that vary; float32 unless the name ends in bf16.

    With "wint4" in the name, its weights are packed; with "split", its routed experts alone; with "mtp" it has a
    multi-token predictor; with "int8 cache", `build` keeps keys and values in int8.
    """
    moe = architecture.startswith("moe")
    sizes = {**SMALL, "num_nextn_predict_layers": int("mtp" in architecture)}
    config = ErnieConfig.from_dict(
        {**sizes, "model_type": "ernie4_5_moe", **EXPERTS} if moe else {**sizes, "model_type": "ernie4_5"}
    )
    generator = torch.Generator().manual_seed(13)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm"):
            tensors[name] = 1 + 0.1 * noise
        elif name == "embed" or len(shape) == 1:
            tensors[name] = 0.05 * noise  # small, or a tied head would mostly repeat the last token
        else:
            tensors[name] = 3 * noise / shape[-1] ** 0.5
    if architecture.endswith("bf16"):
        wide = float32_parameters(config)
        tensors = {name: value if name in wide else value.bfloat16() for name, value in tensors.items()}
    if "split" in architecture:
        routed = {name: pack_parameter(name, tensors[name], "wint4") for name in tensors if ".moe." in name}
        split = {**tensors, **{name: weight for name, weight in routed.items() if name.endswith(ROUTED_EXPERTS)}}
        assert ErnieModel(config, split).is_split
        return ErnieModel(config, split)
    if "wint4" in architecture:
        packed = {name: pack_parameter(name, value, "wint4") for name, value in tensors.items()}
        pack_tied_head(packed, config, "wint4")
        return ErnieModel(config, packed)
    return ErnieModel(config, tensors)


@lru_cache
def plain_answer(architecture: str, number: int) -> list[int]:
    """Greedy tokens with no engine: the whole text through the network, from scratch, for every token."""
    model, tokens = network(architecture), list(PROMPTS[number])
    for _ in range(ANSWER):
        count = len(tokens)
        dtype = torch.int8 if "int8 cache" in architecture else model.dtype
        size = -(-count // 4) * 4
        kv = KVCache.allocate(model.config, num_blocks=1, block_size=size, dtype=dtype, device=model.device)
        everything = torch.arange(count)
        batch = Batch(
            token_ids=torch.tensor(tokens),
            positions=everything,
            slots=everything,
            query_starts=torch.tensor([0, count]),
            context_lens=torch.tensor([count]),
            block_tables=torch.zeros(1, 1, dtype=torch.int64),
            logit_rows=torch.tensor([count - 1]),
            max_query_len=count,
            max_context_len=count,
        )
        logits = model.logits(model.hidden(batch, kv)[-1:])
        assert logits.isfinite().all()
        tokens.append(int(logits.argmax()))
    return tokens[len(PROMPTS[number]) :]


def build(architecture: str, **options: Any) -> Engine:
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_kv_blocks": 60}
    values: dict[str, Any] = {**sizes, "speculation": "off", **options}
    if "int8 cache" in architecture:
        values |= {"kv_cache_dtype": "int8", "block_size": -(-values.get("block_size", 16) // 4) * 4}
    return Engine(network(architecture), {EOS}, EngineOptions.from_keywords(**values))


@pytest.mark.parametrize(
    "architecture",
    [
        "dense",
        "moe",
        "moe bf16",
        "moe wint4",
        "moe wint4 bf16",
        "moe split bf16",
        "dense int8 cache",
        "moe wint4 int8 cache bf16",
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 1},
        {"max_num_seqs": 8, "max_num_batched_tokens": 9},
        {"max_num_batched_tokens": 2048, "block_size": 5},
        {"enable_prefix_caching": False},
        {"num_kv_blocks": 33, "max_model_len": 130, "block_size": 4, "max_num_batched_tokens": 17},
    ],
    ids=["plenty", "one by one", "small chunks", "odd blocks", "no prefix cache", "preempted"],
)
def test_greedy_output_is_the_networks_own(architecture: str, options: dict[str, Any]) -> None:
    engine = build(architecture, **options)
    for state in ("cold", "warm"):
        sinks = [
            add(engine, f"{state} {number}", prompt, max_tokens=ANSWER, ignore_eos=True)
            for number, prompt in enumerate(PROMPTS)
        ]
        run(engine)
        for number, sink in enumerate(sinks):
            assert sink.ids == plain_answer(architecture, number)
            assert sink.end.reason is FinishReason.LENGTH
    assert (engine.stats().preemptions > 0) == (options.get("num_kv_blocks") == 33)
    assert (engine.stats().prefix_hit_tokens > 0) == engine.options.enable_prefix_caching


def test_the_answers_are_worth_comparing() -> None:
    answers = [
        plain_answer(architecture, number) for architecture in ("dense", "moe") for number in range(len(PROMPTS))
    ]
    assert len({tuple(answer) for answer in answers}) == len(answers)
    assert all(len(set(answer)) > 15 for answer in answers), "a network that repeats itself would hide mistakes"


def test_a_seeded_request_draws_the_same_alone_and_among_others() -> None:
    fields: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": 5, "max_tokens": ANSWER, "ignore_eos": True}
    alone = []
    for number, prompt in enumerate(PROMPTS):
        engine = build("moe")
        alone.append(add(engine, str(number), prompt, **fields))
        run(engine)
    engine = build("moe", max_num_batched_tokens=30)
    together = [add(engine, str(number), prompt, **fields) for number, prompt in enumerate(PROMPTS)]
    run(engine)
    assert [sink.ids for sink in together] == [sink.ids for sink in alone]


def test_a_model_is_opened_from_its_source(tmp_path: Path) -> None:
    config = network("moe").config
    source = ModelSource("dummy", tmp_path, config, GenerationConfig(frozenset({EOS, 7})), synthetic_seed=3)
    engine = Engine.open(source, EngineOptions(dtype="bfloat16", device="cpu", max_model_len=64), progress=False)
    sink = add(engine, "first", [5, 6, 7], max_tokens=5, ignore_eos=True)
    run(engine)
    assert (engine.dtype, engine.device, engine.max_model_len) == (torch.bfloat16, torch.device("cpu"), 64)
    assert engine.eos_token_ids == {EOS, 7}
    assert len(sink.ids) == 5


def test_options_that_do_not_fit_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    source = ModelSource("none", tmp_path / "nothing", network("moe").config, GenerationConfig(frozenset()))
    with pytest.raises(OptionError, match=f"max_model_len is {LENGTH + 1}"):
        Engine.open(source, EngineOptions(max_model_len=LENGTH + 1), progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    source = ModelSource("none", tmp_path, network("moe").config, GenerationConfig(frozenset()))
    with pytest.raises(OptionError, match="device is 'cuda:1', "):
        Engine.open(source, EngineOptions(device="cuda:1"), progress=False)


def test_damaged_weights_end_requests_with_a_sentence() -> None:
    sound = network("dense")
    tensors = {name: torch.full(shape, float("nan")) for name, shape in parameter_shapes(sound.config).items()}
    engine = Engine(ErnieModel(sound.config, tensors), {EOS}, EngineOptions())
    sink = add(engine, "lost", [5, 6])
    run(engine)
    assert sink.end.reason is FinishReason.ERROR
    assert sink.end.message is not None
    assert "finite" in sink.end.message
