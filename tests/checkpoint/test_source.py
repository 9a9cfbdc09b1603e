"""Model arguments: what each form of them finds, and the sentence for those that find nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_writer import dense_model, pt_tensors, write_checkpoint

from tern.checkpoint import PRESETS, GenerationConfig, embedded_model_directory, resolve_model
from tern.errors import CheckpointError, OptionError
from tern.model import ErnieConfig


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "小燕鸥", dense_model(), pt_tensors(dense_model()))


def test_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve_model(str(directory))
    assert (source.name, source.directory, source.synthetic_seed) == ("小燕鸥", directory, None)
    assert source.config.architecture == "dense"
    assert resolve_model(directory) == source
    monkeypatch.chdir(directory)
    assert resolve_model(".").name == "小燕鸥"
    monkeypatch.setenv("HOME", str(directory.parent))
    assert resolve_model("~/小燕鸥").directory == directory


def test_none_is_the_embedded_model() -> None:
    if not (embedded_model_directory() / "config.json").exists():
        with pytest.raises(CheckpointError, match=r"embedded/tiny has no config\.json"):
            resolve_model(None)
        return
    source = resolve_model(None)
    assert source.directory == embedded_model_directory()
    assert source.name == "tern-tiny"


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("", "neither a directory nor a hub id"),
        (
            "nowhere",
            "neither a directory nor a hub id: give the directory of a checkpoint, a .gguf file, a hub id",
        ),
        ("./nowhere/at/all", "neither a directory nor a hub id"),
        ("/nowhere", "neither a directory nor a hub id"),
        ("owner/name/more", "neither a directory nor a hub id"),
        ("owner/na me", "neither a directory nor a hub id"),
        ("ERNIE-4.5-0.3B", "or dummy:ernie-4.5-0.3b for random weights"),
        ("https://example.org/model", "neither a directory nor a hub id"),
        ("x" * 5000, "neither a directory nor a hub id"),
        ("nul\0byte", "neither a directory nor a hub id"),
        ("~nobody-of-this-name/it/x", "neither a directory nor a hub id"),
        ("百度/模型", "neither a directory nor a hub id"),
        ("dummy:", "There is no preset ''"),
        ("dummy:gpt-9", r"no preset 'gpt-9' for dummy:; known are .*ernie-4\.5-21b-a3b.*or give"),
        ("dummy:/nowhere/config.json", r"/nowhere/config\.json cannot be read \(No such file or directory\)"),
        ("dummy:tiny?seed=x", "the seed 'x': it must be a whole number from 0"),
        ("dummy:tiny?seed=-1", "the seed '-1'"),
        ("dummy:tiny?seed=99999999999999999999", "the seed"),
        ("dummy:tiny?speed=9", "unknown option 'speed'"),
    ],
)
def test_what_names_no_model(argument: str, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        resolve_model(argument)


def test_a_file_is_not_a_directory(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file: give the directory"):
        resolve_model(str(directory / "model.safetensors"))


def test_only_hub_ids_have_revisions(directory: Path) -> None:
    for model in (str(directory), "dummy:tiny"):
        with pytest.raises(OptionError, match=r"revision is 'main', but .* is no hub id"):
            resolve_model(model, revision="main")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_networks_that_tern_runs(preset: str) -> None:
    source = resolve_model(f"dummy:{preset}?seed=5")
    assert source.synthetic_seed == 5
    assert source.name == f"dummy:{preset}?seed=5"
    assert source.directory == embedded_model_directory()
    assert source.generation == GenerationConfig(eos_token_ids=frozenset({2}))
    assert resolve_model(f"dummy:{preset.upper()}").config == source.config


def test_dummy_of_a_config(directory: Path) -> None:
    for argument in (f"dummy:{directory}/config.json", f"dummy:{directory}"):
        source = resolve_model(argument)
        assert source.config == resolve_model(str(directory)).config
        assert source.synthetic_seed == 0
        assert source.directory == embedded_model_directory()
    (directory / "tokenizer.json").write_text("{}")
    assert resolve_model(f"dummy:{directory}/config.json").directory == directory, "its own tokenizer, if it has one"


class TestGenerationConfig:
    """`generation_config.json` wins over `config.json`; what neither gives is None."""

    config = ErnieConfig.from_dict({**PRESETS["tiny"], "eos_token_id": [2, 5]})

    def read(self, directory: Path, content: object) -> GenerationConfig:
        (directory / "generation_config.json").write_text(json.dumps(content), encoding="utf-8")
        return GenerationConfig.from_directory(directory, self.config)

    def test_absent(self, tmp_path: Path) -> None:
        assert GenerationConfig.from_directory(tmp_path, self.config) == GenerationConfig(frozenset({2, 5}))
        assert self.read(tmp_path, {"eos_token_id": None}).eos_token_ids == {2, 5}

    @pytest.mark.parametrize(("eos", "expected"), [(7, {7}), ([7, 9, 7], {7, 9}), ([], set())])
    def test_eos(self, tmp_path: Path, eos: object, expected: set[int]) -> None:
        assert self.read(tmp_path, {"eos_token_id": eos}).eos_token_ids == expected

    def test_sampling_defaults(self, tmp_path: Path) -> None:
        given = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1, "num_beams": 1}
        found = self.read(tmp_path, given)
        assert (found.temperature, found.top_p, found.top_k, found.repetition_penalty) == (0.8, 0.95, 50, 1.0)
        assert found.sampling_defaults() == {key: given[key] for key in given if key != "num_beams"}
        assert self.read(tmp_path, {"top_k": 3}).sampling_defaults() == {"top_k": 3}

    def test_a_file_that_says_do_sample_false_is_greedy_by_default(self, tmp_path: Path) -> None:
        found = self.read(tmp_path, {"do_sample": False, "temperature": 0.8, "max_new_tokens": 512})
        assert found.sampling_defaults() == {"temperature": 0.0}
        assert (found.do_sample, found.temperature, found.max_new_tokens) == (False, 0.8, 512)
        assert self.read(tmp_path, {"do_sample": True, "temperature": 0.8}).sampling_defaults() == {"temperature": 0.8}

    def test_every_impossible_value_is_listed(self, tmp_path: Path) -> None:
        wrong = {"eos_token_id": [1, 8192], "temperature": "hot", "top_p": 0, "top_k": 2.5, "repetition_penalty": True}
        wrong |= {"do_sample": "yes", "max_new_tokens": 0}
        with pytest.raises(CheckpointError) as caught:
            self.read(tmp_path, wrong)
        assert len(caught.value.problems) == 7
        assert "eos_token_id 8192 is no token: ids go from 0 to 8191" in caught.value.problems
