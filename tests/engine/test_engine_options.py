"""Options and the size of the cache: every wrong value is refused with the value, the limit and the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_fakes import HashModel, add, make_engine, run

from tern.checkpoint import resolve_model
from tern.engine import Engine, EngineOptions
from tern.engine.cache_size import cache_dtype, free_memory, resolve_num_blocks, token_bytes
from tern.errors import OptionError
from tern.ops.placement import interpreted


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_model_len": 1}, "max_model_len is 1: .* from 2"),
        ({"max_model_len": "4k"}, "max_model_len is '4k'"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0: .* from 1 to 4096"),
        ({"max_num_seqs": True}, "max_num_seqs is True"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 63}, "is 63 but max_num_seqs is 64: .* raise the one"),
        ({"block_size": 0}, "block_size is 0"),
        ({"num_kv_blocks": 0}, "num_kv_blocks is 0"),
        ({"kv_cache_memory": -5}, "kv_cache_memory is -5"),
        ({"kv_cache_dtype": "fp4"}, "kv_cache_dtype is 'fp4': it must be one of auto, bfloat16, int8, fp8"),
        ({"attention_backend": "flash"}, "attention_backend is 'flash': it must be one of auto, tern, flash-attn, fla"),
        (
            {"kv_cache_dtype": "int8", "block_size": 6},
            "block_size is 6: with kv_cache_dtype int8 it must be a multiple",
        ),
        ({"num_kv_blocks": 5, "kv_cache_memory": 5}, "both set the size of the cache"),
        ({"max_queue": 0}, "max_queue is 0"),
        ({"kv_cache_dir": 7}, "kv_cache_dir is 7: it must be the path of a directory"),
        ({"kv_cache_dir": ""}, "kv_cache_dir is '': it must be the path of a directory"),
        ({"kv_cache_dir": "kv", "enable_prefix_caching": False}, "'kv' but enable_prefix_caching is false"),
        ({"kv_cache_dir": "kv", "kv_cache_dir_size": 0}, "kv_cache_dir_size is 0"),
        ({"kv_cache_dir": "kv", "kv_cache_dir_size": 2.5}, "kv_cache_dir_size is 2.5"),
        ({"kv_cache_dir_size": 10}, "kv_cache_dir_size is 10, but there is no kv_cache_dir: give one"),
        ({"enable_prefix_caching": "yes"}, "enable_prefix_caching is 'yes'"),
        ({"check_integrity_when_idle": 1}, "check_integrity_when_idle is 1"),
        ({"dtype": "int8"}, "dtype is 'int8': it must be one of auto, float32"),
        ({"device": "tpu"}, "device is 'tpu': it must be auto, cpu, cuda"),
        ({"device": "split:x"}, "device is 'split:x': .* split or split:N"),
        ({"quantization": "int4"}, "quantization is 'int4': it must be one of wint4, wint8, fp8, block_wise_fp8, none"),
        ({"max_num_seq": 4}, "no engine option 'max_num_seq': did you mean max_num_seqs"),
        ({"zzz": 4}, "no engine option 'zzz': known are max_model_len"),
    ],
)
def test_a_wrong_option_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        EngineOptions.from_keywords(**values)


def test_the_defaults_hold_full_sequences_and_stay_within_a_share_of_memory() -> None:
    config = HashModel(length=1000).config
    per_block = token_bytes(config, torch.float32) * 16
    assert per_block == 2 * 4 * 16

    def blocks(free: int, **options: Any) -> int:
        return resolve_num_blocks(EngineOptions(**options), config, torch.float32, free, 1000)

    assert blocks(10**12) == 4 * 63
    assert blocks(10**12, max_num_seqs=2) == 2 * 63
    assert blocks(2 * 100 * per_block) == 100
    assert blocks(100 * per_block) == 63  # a full sequence takes more than the usual share
    assert blocks(71 * per_block) == 63
    assert blocks(70 * per_block, num_kv_blocks=70) == 70
    assert blocks(70 * per_block, kv_cache_memory=70 * per_block + 1) == 70
    for options in ({"num_kv_blocks": 71}, {"kv_cache_memory": 71 * per_block}):
        with pytest.raises(OptionError, match=r"asks for a cache of 71 blocks .* ask for at most 70 blocks"):
            blocks(70 * per_block, **options)
    with pytest.raises(OptionError, match=r"1000 tokens needs 63 cache blocks .* free memory gives 54 .*at most 864"):
        blocks(60 * per_block)
    with pytest.raises(OptionError, match="num_kv_blocks gives 62"):
        blocks(10**12, num_kv_blocks=62)
    with pytest.raises(OptionError, match=r"kv_cache_memory gives 0 \(0 MB\): give the cache more memory"):
        blocks(10**12, kv_cache_memory=1)
    with pytest.raises(OptionError, match="kv_cache_memory gives 62"):
        blocks(10**12, kv_cache_memory=63 * per_block - 1)


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3"])
def test_a_cpu_has_no_fp8_cache(name: str) -> None:
    source = resolve_model(None)
    options = EngineOptions(kv_cache_dtype=name, device="cpu", num_kv_blocks=10)
    words = f"kv_cache_dtype is '{name}', which is for GPUs: on a CPU choose int8"
    with pytest.raises(OptionError, match=words):
        Engine.open(source, options, progress=False)
    with pytest.raises(OptionError, match=words):
        make_engine(kv_cache_dtype=name)


def test_a_gpu_has_no_int8_cache() -> None:
    with interpreted(), pytest.raises(OptionError, match="'int8', which is for CPUs: on a GPU choose fp8"):
        make_engine(kv_cache_dtype="int8")
    with interpreted(), pytest.raises(OptionError, match="or choose kv_cache_dtype fp8, which takes about half"):
        make_engine(num_kv_blocks=1)
    with pytest.raises(OptionError, match="or choose kv_cache_dtype int8, which takes about half"):
        make_engine(num_kv_blocks=1)


def test_caches_of_8_bits() -> None:
    config = resolve_model(None).config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert {cache_dtype(name, torch.bfloat16) for name in ("fp8", "fp8_e4m3")} == {torch.float8_e4m3fn}
    assert token_bytes(config, torch.float8_e4m3fn) == numbers
    assert token_bytes(config, torch.bfloat16) == 2 * numbers


def test_a_length_beyond_the_model_is_refused() -> None:
    with pytest.raises(OptionError, match="max_model_len is 97 but the model was trained for 96"):
        make_engine(max_model_len=97)
    assert make_engine(max_model_len=50).max_model_len == 50


def test_the_smallest_pool_serves_a_full_length_sequence() -> None:
    engine = make_engine(max_model_len=30, num_kv_blocks=8)
    sinks = [add(engine, str(number), [number], max_tokens=29, ignore_eos=True) for number in range(3, 6)]
    run(engine)
    assert [len(sink.ids) for sink in sinks] == [29] * 3


def test_free_memory_is_a_plausible_number_of_bytes() -> None:
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ('{"method": "ngram"}', {"speculation": "ngram"}),
        ({"method": "ernie_mtp", "num_speculative_tokens": 1}, {"speculation": "mtp", "num_speculative_tokens": 1}),
        (
            '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}',
            {"speculation": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 4},
        ),
        ({"method": "ngram_match", "prompt_lookup_max": 2}, {"prompt_lookup_min": 2, "prompt_lookup_max": 2}),
        ({"method": "ngram", "prompt_lookup_min": 9}, {"prompt_lookup_min": 9, "prompt_lookup_max": 9}),
        (None, {"speculation": "auto", "num_speculative_tokens": None}),
    ],
)
def test_vllms_speculative_config_is_read(config: Any, expected: dict[str, Any]) -> None:
    options = EngineOptions.from_keywords(speculative_config=config)
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"speculation": "eagle"}, "speculation is 'eagle': it must be one of auto, off, ngram, mtp"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens is 0: .* from 1 to 64"),
        ({"prompt_lookup_max": 65}, "prompt_lookup_max is 65"),
        ({"prompt_lookup_min": 9}, "prompt_lookup_min is 9: .* from 1 to 8"),
        ({"speculative_config": "{ngram}"}, "speculative_config is '{ngram}': it is not valid JSON"),
        ({"speculative_config": "[" * 100_000}, "not valid JSON"),
        ({"speculative_config": "[5]"}, r"speculative_config is '\[5\]': give an object such as"),
        ({"speculative_config": {}}, "method is None: it must be ngram or mtp"),
        ({"speculative_config": {"method": "eagle3"}}, "method is 'eagle3': it must be ngram or mtp"),
        ({"speculative_config": {"method": ["mtp"]}}, r"method is \['mtp'\]"),
        ({"speculative_config": {"method": "mtp", "model": "x"}}, "has 'model', which Tern does not know: leave it"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": "5"}}, "tokens is '5'"),
        (
            {"speculative_config": {"method": "mtp"}, "speculation": "off"},
            "speculation and speculative_config are both",
        ),
    ],
)
def test_wrong_speculation_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        EngineOptions.from_keywords(**values)
