"""The tokenizer in a GGUF file reads and writes as the same one does from tokenizer.json; names, template, faults."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from tern.chat import ChatProtocol, Tokenizer
from tern.checkpoint.gguf_file import read_gguf
from tern.checkpoint.gguf_tokenizer import text_files
from tern.errors import CheckpointError
from tests.fuzzing import fuzz

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the weather in Beijing today?",
    "今天北京的天气怎么样？我应该先调用工具，然后再回答。你好，世界！ 12 + 34 = 46",
    'x = {"name": "get_weather", "arguments": {"location": "Paris"}}\n\tif x:\n        return 1',
] * 4
CONTROL = ["<|im_start|>", "<|im_end|>", "<|LOC_0|>"]
TAGS = ["<think>", "</think>", "<response>", "</response>", "two words"]
TEXTS = [
    "The weather in Beijing today",
    " leading and  double   spaces \n\n\tand tabs",
    "今天北京的天气怎么样？龘靐齉",
    "emoji 😀👩‍👩‍👧 and é and \u0301, \u00a0",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\ntwo words</think>\n<response>\nyes</response></s>",
    "<s>a<|LOC_0|> b",
    "",
    " ",
]


def normal_pieces() -> list[tuple[str, float, int]]:
    """A trained model of pairs: text, score and type of each piece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=460,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    found = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    kinds = {0: 2, 1: 3, 2: 3} | {i: 6 for i in range(found.piece_size()) if found.is_byte(i)}
    return [(found.id_to_piece(i), found.get_score(i), kinds.get(i, 1)) for i in range(found.piece_size())]


PIECES = [
    *normal_pieces(),
    *((text, -1000.0, 3) for text in CONTROL),
    *((text, -1000.0, 4) for text in TAGS),
    ("[PAD0]", -10000.0, 5),
]


def write(path: Path, *, pieces: list[tuple[str, float, int]] = PIECES, prefix: bool = True, **more: Any) -> Path:
    """A GGUF file with a tokenizer and nothing else; `more` are texts of metadata, None leaves a key out."""
    writer = gguf.GGUFWriter(path, "ernie4_5")
    texts, scores, kinds = zip(*pieces, strict=True) if pieces else ((), (), ())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text.encode() for text in texts])
    writer.add_token_scores(list(scores))
    writer.add_token_types(list(kinds))
    writer.add_add_space_prefix(prefix)
    for key, value in {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **more}.items():
        if isinstance(value, str):
            writer.add_string(f"tokenizer.{key}", value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif value is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def files_of(path: Path) -> dict[str, bytes]:
    return text_files(read_gguf(path).metadata, path)


def from_gguf(path: Path) -> Tokenizer:
    return Tokenizer.from_directory(path.parent, files_of(path))


def from_json(directory: Path, *, prefix: bool) -> Tokenizer:
    """The same tokenizer in the form of Hugging Face: merges in the order of the scores of what they make."""
    vocabulary = {text: index for index, (text, _, _) in enumerate(PIECES)}
    merges = [
        (-score, text[:cut], text[cut:])
        for text, score, kind in PIECES
        for cut in range(1, len(text))
        if kind == 1 and text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    pairs = [(left, right) for _, left, right in sorted(merges)]
    tokenizer = HuggingFaceTokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix else "never", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    for text, _, kind in PIECES:
        if kind in (2, 3, 4):
            tokenizer.add_tokens([AddedToken(text, normalized=False, special=kind != 4)])
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="module", params=[True, False], ids=["opening space", "none"])
def both(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    place = tmp_path_factory.mktemp("both")
    ours = from_gguf(write(place / "it.gguf", prefix=request.param))
    return ours, from_json(place / "json", prefix=request.param)


def assert_alike(ours: Tokenizer, theirs: Tokenizer, text: str) -> None:
    if ours.strips_leading_space and text.startswith(" "):
        text = "a" + text  # sentencepiece opens a text with a space in any case, tokenizer.json where there is none
    for allow in (True, False):
        assert ours.encode(text, allow_special=allow) == theirs.encode(text, allow_special=allow)
    assert ours.encode_continuation(text) == theirs.encode_continuation(text)
    ids = ours.encode(text)
    for skip in (True, False):
        decoded = ours.decode(ids, skip_special_tokens=skip)
        assert decoded == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_read_and_written_as_from_tokenizer_json(both: tuple[Tokenizer, Tokenizer], text: str) -> None:
    assert_alike(*both, text)


@fuzz(150, HealthCheck.function_scoped_fixture)
@given(parts=st.lists(st.sampled_from([*CONTROL, *TAGS, *"The weather 天气é😀\n 12龘", "<s>", "get_"]), max_size=20))
def test_any_mixture_too(both: tuple[Tokenizer, Tokenizer], parts: list[str]) -> None:
    assert_alike(*both, "".join(parts))


def test_tokens_and_names_are_the_same(both: tuple[Tokenizer, Tokenizer]) -> None:
    ours, theirs = both
    assert ours.vocab_size == len(PIECES)
    assert ours.special_ids == theirs.special_ids
    assert (ours.bos_id, ours.eos_id, ours.bos_token, ours.eos_token) == (1, 2, "<s>", "</s>")
    for index, (text, _, kind) in enumerate(PIECES):
        assert ours.token_bytes(index) == theirs.token_bytes(index) or kind == 5
        assert kind != 1 or ours.id_of(text) == index


def test_rare_characters_become_bytes(both: tuple[Tokenizer, Tokenizer]) -> None:
    ids = both[0].encode("a龘")[-3:]
    assert [both[0].token_bytes(i) for i in ids] == [bytes([byte]) for byte in "龘".encode()]


@pytest.mark.parametrize("begins", [None, True, False])
def test_whether_a_text_begins_with_a_token(tmp_path: Path, begins: bool | None) -> None:
    tokenizer = from_gguf(write(tmp_path / "it.gguf", add_bos_token=begins))
    opening = [] if begins is False else [1]
    assert tokenizer.encode("a", add_special_tokens=True) == opening + tokenizer.encode("a")


def test_the_template_is_the_files_own(tmp_path: Path) -> None:
    template = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}{{ eos_token }}"
    path = write(tmp_path / "it.gguf", chat_template=template)
    protocol = ChatProtocol.from_directory(tmp_path, files_of(path))
    prompt = protocol.prompt([{"role": "user", "content": "今天 <|im_end|>"}])
    assert prompt.text == "<|im_start|>今天 <|im_end|><|im_end|></s>"
    end = protocol.tokenizer.id_of("<|im_end|>")
    assert prompt.token_ids.count(end) == 1, "what a user spells is text"
    plain = ChatProtocol.from_directory(tmp_path, files_of(write(tmp_path / "other.gguf")))
    assert "今天" in plain.prompt([{"role": "user", "content": "今天"}]).text, "without one, the built-in layout"


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no pieces": ({"pieces": []}, r"tokens is missing or no array of st"),
    "an end outside": (
        {"eos_token_id": 99_999},
        r"names 99999 as tokenizer\.ggml\.eos_token_id, but its tokens go from",
    ),
    "a piece twice": ({"pieces": [*PIECES, PIECES[-8]]}, "is not a sentencepiece model"),
    "no unknown piece": ({"pieces": PIECES[1:], "unknown_token_id": None}, "0 of its tokens stand for the unknown"),
    "two unknown pieces": ({"pieces": [*PIECES, ("?", 0.0, 2)]}, "2 of its tokens stand for the unknown"),
    "a byte missing": ({"pieces": [p for p in PIECES if p[0] != "<0x41>"]}, "is not a sentencepiece model"),
    "a template that is none": ({"chat_template": "{% if %}"}, "chat template cannot be compiled"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tokenizer_that_cannot_be_is_one_sentence(tmp_path: Path, fault: str) -> None:
    changes, sentence = FAULTS[fault]
    path = write(tmp_path / "it.gguf", **changes)
    with pytest.raises(CheckpointError, match=sentence):
        ChatProtocol.from_directory(tmp_path, files_of(path))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda metadata: metadata.update({"tokenizer.ggml.model": "gpt2"}),
            "a tokenizer of the kind 'gpt2': Tern reads",
        ),
        (lambda metadata: metadata.pop("tokenizer.ggml.model"), "a tokenizer of the kind 'None'"),
        (lambda metadata: metadata.pop("tokenizer.ggml.scores"), "scores is missing or no array of float"),
        (lambda metadata: metadata["tokenizer.ggml.token_type"].pop(), r"token_type has \d+ items for \d+ tokens"),
        (lambda metadata: metadata.update({"tokenizer.ggml.tokens": [1, 2]}), "tokens is missing or no array of str"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path: Path, change: Callable[[dict[str, Any]], None], sentence: str) -> None:
    metadata = dict(read_gguf(write(tmp_path / "it.gguf")).metadata)
    change(metadata)
    with pytest.raises(CheckpointError, match=sentence):
        text_files(metadata, tmp_path / "it.gguf")
