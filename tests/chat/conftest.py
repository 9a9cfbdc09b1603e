"""Small tokenizers of each kind, trained once for a run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from tern.chat import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the weather in Beijing today?",
    "I should call the tool and then answer. 12 + 34 = 46, 100 - 7 = 93",
    "今天北京的天气怎么样？我应该先调用工具，然后再回答。你好，世界！",
    'x = {"name": "get_weather", "arguments": {"location": "Paris"}}\n\tif x:\n        return 1',
] * 4
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"]


def save(tokenizer: HuggingFaceTokenizer, directory: Path, **config) -> Path:
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names | config), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def byte_level_directory(tmp_path_factory) -> Path:
    """Byte-level BPE; the tags are single tokens that count as text."""
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    tokenizer.add_tokens([AddedToken("工具 Ġ", normalized=False, special=False)])
    return save(tokenizer, tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def piece_directory(tmp_path_factory) -> Path:
    """BPE with byte fallback in the manner of sentencepiece; the tags are control tokens, and some are missing."""
    tokenizer = HuggingFaceTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*SPECIAL, "<unk>", *TAGS[:4], *pieces], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in pieces]
    return save(HuggingFaceTokenizer.from_str(json.dumps(raw)), tmp_path_factory.mktemp("pieces"))


@pytest.fixture(scope="session")
def sentencepiece_directory(tmp_path_factory) -> Path:
    """A sentencepiece model and nothing else but the tokens that the configuration adds."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        pad_id=3,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).piece_size()
    added = {
        str(size): {"content": "<|im_start|>", "special": True},
        str(size + 1): {"content": "<|im_end|>", "special": True},
        str(size + 2): {"content": "</think>", "special": True},
        str(size + 3): {"content": "<tool_call>", "special": False},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    return directory


@pytest.fixture(scope="session", params=["byte_level_directory", "piece_directory", "sentencepiece_directory"])
def directory(request) -> Path:
    """Each kind of tokenizer in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tokenizer(directory) -> Tokenizer:
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="session")
def byte_level(byte_level_directory) -> Tokenizer:
    return Tokenizer.from_directory(byte_level_directory)
