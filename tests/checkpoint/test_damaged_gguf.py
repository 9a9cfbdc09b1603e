"""A GGUF file that is cut short, lies or holds something else is one error that says so, at once and within memory."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoint_writer import dense_model, moe_model
from gguf_writer import Type, finish, write_gguf

from tern.checkpoint import load_tensors, resolve_model
from tern.checkpoint.gguf_file import MAX_ITEMS, MAX_RECORDS, read_gguf
from tern.errors import CheckpointError, TernError, UnsupportedConfigError

TENSORS, PAIRS, FIRST_KEY = 8, 16, 24
"""Where the counts stand in a file, and its first key."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a small file without fault."""
    path = tmp_path_factory.mktemp("sound") / "it.gguf"
    write_gguf(path, dense_model(num_hidden_layers=1), "F16")
    return path.read_bytes()


@pytest.fixture
def complaint(tmp_path: Path) -> Callable[[bytes], str]:
    """Writes a file and returns the text of the error that opening and loading it raises."""

    def raised(content: bytes) -> str:
        (tmp_path / "it.gguf").write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_tensors(resolve_model(tmp_path / "it.gguf"))
        return str(caught.value)

    return raised


def patched(content: bytes, place: int, value: int, size: int = 8) -> bytes:
    return content[:place] + value.to_bytes(size, "little") + content[place + size :]


def test_cut_short_anywhere(sound: bytes, complaint: Callable[[bytes], str]) -> None:
    data = read_length(sound)
    for length in [*range(200), *range(200, data, 211), data, len(sound) - 1]:
        text = complaint(sound[:length])
        assert "is truncated" in text, length
        assert str(length) in text, length


def read_length(content: bytes) -> int:
    """The bytes of a header, up to where its last tensor is recorded."""
    return content.rindex(b".weight") + 40


def test_any_byte_may_be_wrong(sound: bytes, tmp_path: Path) -> None:
    """Whatever stands in the header, there is an answer or one of our errors, and no file is read beyond its end."""
    draw = random.Random(11)
    path = tmp_path / "it.gguf"
    complaints: list[str] = []
    for _ in range(200):
        content = bytearray(sound)
        for _ in range(draw.choice([1, 1, 2, 8])):
            content[draw.randrange(read_length(sound))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            load_tensors(resolve_model(path))
        except TernError as error:
            complaints.append(str(error))
    assert 50 < len(complaints) < 200
    assert max(map(len, complaints)) < 5000


def test_what_is_no_gguf(complaint: Callable[[bytes], str], sound: bytes) -> None:
    assert "is no GGUF file: it does not begin with GGUF" in complaint(b"PK\3\4" + sound[4:])
    assert "is GGUF of version 1: Tern reads versions 2 and 3" in complaint(patched(sound, 4, 1, 4))
    big = struct.pack(">I", 3)
    assert "(or a big-endian file)" in complaint(sound[:4] + big + sound[8:])


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (TENSORS, MAX_RECORDS + 1, f"announces {MAX_RECORDS + 1} tensors, more than {MAX_RECORDS}"),
        (TENSORS, 2**63, "tensors, more than"),
        (PAIRS, 2**40, "pairs of metadata, more than"),
        (FIRST_KEY, 2**20, "bytes of text, more than"),
        (FIRST_KEY, 2**62, "bytes of text, more than"),
    ],
)
def test_counts_that_lie(
    sound: bytes, complaint: Callable[[bytes], str], place: int, value: int, sentence: str
) -> None:
    text = complaint(patched(sound, place, value))
    assert sentence in text
    assert "download it again" in text


def after(content: bytes, key: str) -> int:
    """Where the value of a key begins, behind its type."""
    return content.index(key.encode()) + len(key) + 4


def test_arrays_and_texts_that_lie(sound: bytes, complaint: Callable[[bytes], str]) -> None:
    tokens, name = after(sound, "tokenizer.ggml.tokens"), after(sound, "tokenizer.ggml.model")
    assert f"items in an array, more than {MAX_ITEMS}" in complaint(patched(sound, tokens + 4, 2**40))
    assert "is truncated" in complaint(patched(sound, name, 2**26))
    assert "has items of type 9" in complaint(patched(sound, tokens, 9, 4))
    assert "the unknown type 77" in complaint(patched(sound, name - 4, 77, 4))
    assert "is not UTF-8" in complaint(sound[: name + 8] + b"\xff" + sound[name + 9 :])
    assert "a tokenizer of the kind 'gpt-x'" in complaint(sound[: name + 8] + b"gpt-x" + sound[name + 13 :])


def record_of(content: bytes, name: str) -> int:
    """Where the record of a tensor goes on behind its name."""
    return content.index(name.encode()) + len(name)


def test_tensors_that_lie(sound: bytes, complaint: Callable[[bytes], str]) -> None:
    record = record_of(sound, "output_norm.weight")  # dimensions, one width, type, offset
    assert "9 dimensions, more than 4" in complaint(patched(sound, record, 9, 4))
    assert "is truncated" in complaint(patched(sound, record + 4, 2**50))
    assert "overlaps" in complaint(patched(sound, record + 16, 0))
    assert "is truncated: its header asks for" in complaint(patched(sound, record + 16, 2**40))
    assert "1 tensors in IQ4_XS ('output_norm.weight' for one), but Tern reads F32, F16, BF16, Q4_0" in complaint(
        patched(sound, record + 12, 23, 4)
    )
    assert "in number 99" in complaint(patched(sound, record + 12, 99, 4))
    assert "no whole blocks of 256" in complaint(patched(sound, record + 12, int(Type.Q4_K), 4))


def test_two_of_a_name(sound: bytes, complaint: Callable[[bytes], str]) -> None:
    assert "the tensor 'blk.0.attn_k.weight' occurs twice" in complaint(
        sound.replace(b"blk.0.attn_v.weight", b"blk.0.attn_k.weight")
    )
    bos, eos = b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"
    assert "the key 'tokenizer.ggml.bos_token_id' occurs twice" in complaint(sound.replace(eos, bos))


@pytest.mark.parametrize("alignment", [1, 64, 4096])
def test_other_alignments(tmp_path: Path, alignment: int) -> None:
    writer = gguf.GGUFWriter(tmp_path / "it.gguf", "x")
    writer.add_custom_alignment(alignment)
    for name in ("a", "b"):
        writer.add_tensor(name, np.arange(5, dtype=np.float32))
    finish(writer)
    first, second = read_gguf(tmp_path / "it.gguf").entries
    assert first.start % alignment == second.start % alignment == 0
    content = (tmp_path / "it.gguf").read_bytes()
    assert np.frombuffer(content, np.float32, 5, second.start).tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "it.gguf").write_bytes(patched(content, after(content, "general.alignment"), 24, 4))
    with pytest.raises(CheckpointError, match="its alignment is 24, which is no power of two"):
        read_gguf(tmp_path / "it.gguf")


def test_another_architecture_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "it.gguf", dense_model(), "F16", architecture="qwen3moe")
    with pytest.raises(UnsupportedConfigError, match="architecture 'qwen3moe': Tern runs ernie4_5-moe and ernie4_5"):
        resolve_model(tmp_path / "it.gguf")


def test_a_network_that_cannot_be_is_listed(tmp_path: Path) -> None:
    metadata = {"ernie4_5-moe.rope.scaling.type": "yarn", "ernie4_5-moe.rope.dimension_count": 4}
    write_gguf(tmp_path / "it.gguf", moe_model(), "F16", metadata=metadata)
    with pytest.raises(UnsupportedConfigError) as caught:
        resolve_model(tmp_path / "it.gguf")
    assert "it.gguf describes a network that Tern does not run, in the terms of config.json:" in str(caught.value)
    assert "rope type 'yarn'" in str(caught.value)
    assert "partial_rotary_factor is 0.5" in str(caught.value)


def test_sampling_values_that_cannot_be_are_listed(tmp_path: Path) -> None:
    write_gguf(tmp_path / "it.gguf", dense_model(), "F16", metadata={"general.sampling.top_p": 7})
    with pytest.raises(CheckpointError, match=r"it\.gguf has values .*\n  - top_p is 7"):
        resolve_model(tmp_path / "it.gguf")


def test_tensors_that_are_missing_or_too_many_have_their_own_names(
    sound: bytes, complaint: Callable[[bytes], str]
) -> None:
    text = complaint(sound.replace(b"blk.0.ffn_down.weight", b"blk.0.ffn_dawn.weight"))
    assert "missing: blk.0.ffn_down.weight, needed for layers.0.mlp.down.weight [32, 48]" in text
    assert "surplus: blk.0.ffn_dawn.weight [32, 48] is no tensor of this architecture" in text


def test_experts_that_are_missing(tmp_path: Path, complaint: Callable[[bytes], str]) -> None:
    write_gguf(tmp_path / "moe.gguf", moe_model(), "F16")
    content = (tmp_path / "moe.gguf").read_bytes()
    text = complaint(content.replace(b"blk.1.ffn_up_exps.weight", b"blk.7.ffn_up_exps.weight"))
    assert "missing: blk.1.ffn_up_exps.weight, needed for layers.1.moe.gate_up [4, 48, 32]" in text
    assert "surplus: blk.7.ffn_up_exps.weight [4, 24, 32] has no place" in text
