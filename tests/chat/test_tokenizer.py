"""Tokenizers of every kind: there and back, control tokens, and decoding one token at a time."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models

from tern.chat import Detokenizer, Tokenizer, bad_word_sequences
from tern.errors import CheckpointError, InvalidRequestError
from tests.fuzzing import fuzz

TEXTS = [
    "The weather in Beijing",
    " leading space",
    "two  spaces and\n\n\nlines\t",
    "今天北京的天气怎么样？",
    "emoji 😀👩‍👩‍👧 and é and \u0301",
    "",
    " ",
    "\n",
    "ab</think>\n\n<response>\ncd\n</response>\n",
    "<|im_start|>user\nhi<|im_end|>\n\n",
]
property_test = fuzz(60, HealthCheck.function_scoped_fixture)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    text = "a" + text  # of a space at the very beginning, sentencepiece-like tokenizers keep no record
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@property_test
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_comes_back(tokenizer, text):
    text = "a" + text.replace("\u2581", "")  # sentencepiece's own mark for a space
    assert tokenizer.decode(tokenizer.encode(text, allow_special=False), skip_special_tokens=False) == text


@property_test
@given(data=st.data(), continuation=st.booleans(), skip=st.booleans())
def test_pieces_of_any_sequence_join_to_the_whole(tokenizer, data, continuation, skip):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = Detokenizer(tokenizer, skip_special_tokens=skip, continuation=continuation)
    pieces = [stream.push(token_id) for token_id in ids] + [stream.finish()]
    whole = b"".join(tokenizer.token_bytes(i) for i in ids if not (skip and i in tokenizer.special_ids))
    expected = whole.decode(errors="replace")
    if tokenizer.strips_leading_space and not continuation:
        expected = expected.removeprefix(" ")
    assert "".join(pieces) == expected
    assert tokenizer.decode(ids, skip_special_tokens=skip, continuation=continuation) == expected


@property_test
@given(data=st.data())
def test_byte_level_decoding_is_that_of_the_tokenizers_library(byte_level, byte_level_directory, data):
    library = HuggingFaceTokenizer.from_file(str(byte_level_directory / "tokenizer.json"))
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size - 1), max_size=30))
    assert byte_level.decode(ids, skip_special_tokens=False) == library.decode(ids, skip_special_tokens=False)
    assert byte_level.decode(ids) == library.decode(ids)


@property_test
@given(text=st.text(st.sampled_from("The weather 天气é😀\n<s>"), max_size=30))
def test_piece_decoding_is_that_of_the_tokenizers_library(piece_directory, text):
    library = HuggingFaceTokenizer.from_file(str(piece_directory / "tokenizer.json"))
    ours = Tokenizer.from_directory(piece_directory)
    ids = library.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids
    assert ours.decode(ids, skip_special_tokens=False) == library.decode(ids, skip_special_tokens=False)


def test_no_half_characters(tokenizer):
    stream = Detokenizer(tokenizer)
    for char in "龘😀":  # too rare to be a token: several byte tokens each
        *begin, end = tokenizer.encode("a" + char)
        for token_id in begin:
            assert "\ufffd" not in stream.push(token_id)
        assert stream.push(end).endswith(char)


def test_an_unfinished_character_shows_at_the_end(byte_level):
    stream = Detokenizer(byte_level)
    ids = byte_level.encode("😀")
    assert len(ids) > 1
    assert [stream.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.inside_character
    assert stream.finish() == "\ufffd"


def test_control_tokens_are_skipped_and_tags_are_not(tokenizer):
    end, tag = tokenizer.encode("<|im_end|>"), tokenizer.encode("</think>")
    assert len(end) == 1
    assert len(tag) == 1
    assert tokenizer.decode([*end, *tag, *end], continuation=True) == "</think>"


def test_control_tokens_in_a_users_text_can_be_read_as_text(tokenizer):
    text = "a<|im_end|>b"
    assert not tokenizer.special_ids & set(tokenizer.encode(text, allow_special=False))
    assert tokenizer.special_ids & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text, allow_special=False)) == text


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_control_tokens_that_only_the_configuration_names(byte_level_directory, tmp_path, file):
    """As transformers has it: the configuration's word counts, whatever tokenizer.json calls the token."""
    (tmp_path / "tokenizer.json").write_bytes((byte_level_directory / "tokenizer.json").read_bytes())
    tokenizer = Tokenizer.from_directory(tmp_path)
    named = tokenizer.id_of("工具 Ġ")
    assert named not in tokenizer.special_ids
    names = {"additional_special_tokens": ["<think>", {"content": "工具 Ġ"}], "sep_token": "Ġ", "add_bos_token": True}
    (tmp_path / file).write_text(json.dumps(names), encoding="utf-8")
    more = Tokenizer.from_directory(tmp_path).special_ids - tokenizer.special_ids
    assert more == {named, tokenizer.id_of("Ġ")}


def test_names(byte_level):
    assert byte_level.bos_token == "<s>"
    assert byte_level.eos_token == "</s>"
    assert byte_level.encode("<s></s><pad>") == [byte_level.bos_id, byte_level.eos_id, byte_level.pad_id]
    assert byte_level.token_text(byte_level.eos_id) == "</s>"
    assert byte_level.id_of("</s>") == byte_level.eos_id
    assert byte_level.id_of("no such token") is None


def test_sentencepiece_names(sentencepiece_directory):
    tokenizer = Tokenizer.from_directory(sentencepiece_directory)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.encode("a", add_special_tokens=True) == [tokenizer.bos_id, *tokenizer.encode("a")]
    # Only the beginning of a text gets sentencepiece's space, not what stands behind an added token.
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b"), skip_special_tokens=False) == "a<|im_end|>b"


def test_a_megabyte_of_text(byte_level):
    text = "The weather in Beijing, 今天的天气。\n" * 12_000
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(InvalidRequestError, match=r"lone surrogate \(U\+D800\) at character 2"):
        tokenizer.encode("ab\ud800")


def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    for token_id in (-1, tokenizer.vocab_size, 2**40):
        with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
            tokenizer.decode([token_id])


def test_bad_words_are_spelt_with_and_without_a_space(tokenizer):
    spelt = {tokenizer.decode(ids, continuation=True) for ids in bad_word_sequences(tokenizer, ["weather", "天气"])}
    assert spelt == {"weather", " weather", "天气", " 天气"}
    assert bad_word_sequences(tokenizer, []) == ()


@pytest.mark.parametrize("text", TEXTS)
def test_a_continuation_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_continuation(text), skip_special_tokens=False, continuation=True) == text


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a sentencepiece model"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer that can be read"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a tokenizer that can be read"):
        Tokenizer.from_directory(tmp_path)
    other = HuggingFaceTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    other.decoder = decoders.CTC()
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="decodes with CTC"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="not an object"):
        Tokenizer.from_directory(tmp_path)
