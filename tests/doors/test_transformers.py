"""The transformers door beside transformers itself, on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from tern.checkpoint import embedded_model_directory
from tern.errors import InvalidRequestError, OptionError
from tern.transformers import AutoModelForCausalLM, AutoTokenizer, TernForCausalLM, TernTokenizer

QUESTION = [{"role": "user", "content": "Give me a short introduction to large language model."}]
MODEL = str(embedded_model_directory())


@pytest.fixture(scope="module")
def tokenizer() -> TernTokenizer:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> TernForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL, device_map="auto", torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def test_the_model_cards_snippet(tokenizer: TernTokenizer, model: TernForCausalLM) -> None:
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    model_inputs = tokenizer([text], add_special_tokens=False, return_tensors="pt").to(model.device)
    generated = model.generate(**model_inputs, max_new_tokens=256)
    output_ids = generated[0][len(model_inputs.input_ids[0]) :].tolist()
    answer = tokenizer.decode(output_ids, skip_special_tokens=True)
    assert "language model" in answer
    assert torch.equal(generated[0][: len(model_inputs.input_ids[0])], model_inputs.input_ids[0])


def test_greedy_output_is_that_of_transformers(
    tokenizer: TernTokenizer, model: TernForCausalLM, theirs: transformers.PreTrainedModel
) -> None:
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer([str(text)], return_tensors="pt")
    expected = theirs.generate(**inputs, max_new_tokens=96, do_sample=False)
    assert model.generate(**inputs, max_new_tokens=96).tolist() == expected.tolist()


def test_a_padded_batch_gives_each_rows_own_answer(
    tokenizer: TernTokenizer, model: TernForCausalLM, theirs: transformers.PreTrainedModel
) -> None:
    texts = ["Hello", "What is 3 + 4?", "你好，请问今天天气怎么样？"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    rows = model.generate(**batch, max_new_tokens=8, min_new_tokens=8)
    expected = theirs.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert rows.tolist() == expected.tolist()


def test_the_tokenizers_agree(tokenizer: TernTokenizer) -> None:
    original = transformers.AutoTokenizer.from_pretrained(MODEL)
    for text in ["What is 12 + 34?", "北京今天天气怎么样？", "<|im_start|>user\nx<|im_end|>", " a  b\n\n"]:
        assert tokenizer.encode(text) == original.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == original.eos_token_id
    assert tokenizer.pad_token_id == original.pad_token_id
    expected = original.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True) == expected


def test_sampling_is_repeatable_and_returns_every_sequence(tokenizer: TernTokenizer, model: TernForCausalLM) -> None:
    inputs = tokenizer("Hello", return_tensors="pt")
    arguments = {"max_new_tokens": 8, "do_sample": True, "temperature": 5.0, "seed": 3, "num_return_sequences": 3}
    first, again = (model.generate(**inputs, **arguments) for _ in range(2))
    assert first.shape[0] == 3
    assert first.tolist() == again.tolist()
    assert len({tuple(row) for row in first.tolist()}) > 1


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_what_a_checkpoint_puts_around_a_text_is_put_there(tmp_path: Path, add_special_tokens: bool) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        (tmp_path / file).write_bytes((embedded_model_directory() / file).read_bytes())
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    ours, original = AutoTokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours("Hello") == dict(original("Hello"))
    expected = original("Hello", add_special_tokens=add_special_tokens)
    assert ours("Hello", add_special_tokens=add_special_tokens) == dict(expected)
    assert ours.apply_chat_template(QUESTION).input_ids.count(1) == 0, "a template writes its own"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stands_on_the_side_asked_for(side: str) -> None:
    ours = AutoTokenizer.from_pretrained(MODEL, padding_side=side)
    original = transformers.AutoTokenizer.from_pretrained(MODEL, padding_side=side)
    texts = ["Hello", "What is 3 + 4?"]
    mine, theirs = (each(texts, return_tensors="pt", padding=True) for each in (ours, original))
    assert mine.input_ids.tolist() == theirs.input_ids.tolist()
    assert mine.attention_mask.tolist() == theirs.attention_mask.tolist()
    with pytest.raises(OptionError, match="'top'"):
        AutoTokenizer.from_pretrained(MODEL, padding_side="top")


def test_a_tool_loop_without_ids_renders_as_in_transformers(tokenizer: TernTokenizer) -> None:
    calls = [{"type": "function", "function": {"name": name, "arguments": {"x": 1}}} for name in ("f", "g")]
    messages = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "name": "f", "content": "22"},
        {"role": "tool", "name": "g", "content": "23"},
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(MODEL)
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    with pytest.raises(InvalidRequestError, match=r"messages\[4\]\.tool_call_id"):
        tokenizer.apply_chat_template([*messages, messages[-1]], tokenize=False)


def test_the_smaller_methods_answer_as_in_transformers(tokenizer: TernTokenizer, model: TernForCausalLM) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(MODEL)
    for name in ("eos_token", "bos_token", "pad_token"):
        assert getattr(tokenizer, name) == getattr(theirs, name)
    assert tokenizer.convert_tokens_to_ids("</s>") == theirs.convert_tokens_to_ids("</s>")
    assert tokenizer.convert_tokens_to_ids(["<s>", "no such token"]) == [1, None]
    ids = tokenizer.encode("Hello", return_tensors="pt")
    assert torch.equal(ids, theirs.encode("Hello", return_tensors="pt"))
    assert model.to("cpu") is model
    with pytest.raises(OptionError, match="device_map"):
        model.to("cuda")
    by_name = model.generate(inputs=ids, max_new_tokens=3)
    assert torch.equal(by_name, model.generate(ids, max_new_tokens=3))
    assert torch.equal(by_name, model.generate(input_ids=ids, max_new_tokens=3))


def test_several_conversations_render_as_in_transformers(tokenizer: TernTokenizer) -> None:
    original = transformers.AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    chats = [QUESTION, [{"role": "user", "content": "你好"}]]
    for arguments in (
        {"tokenize": False},
        {"return_dict": False},
        {"padding": True, "return_tensors": "pt", "return_dict": False},
    ):
        ours, expected = (
            each.apply_chat_template(chats, add_generation_prompt=True, **arguments) for each in (tokenizer, original)
        )
        as_lists = [each.tolist() if isinstance(each, torch.Tensor) else each for each in (ours, expected)]
        assert as_lists[0] == as_lists[1]


def test_generation_configs_give_what_they_give_in_transformers(
    tokenizer: TernTokenizer, model: TernForCausalLM, theirs: transformers.PreTrainedModel
) -> None:
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer([str(text)], return_tensors="pt")
    width = inputs.input_ids.shape[1]
    config = transformers.GenerationConfig(max_new_tokens=12, min_new_tokens=12, repetition_penalty=1.3)
    for ours in (config, config.to_dict()):
        generated = model.generate(**inputs, generation_config=ours)
        assert generated.tolist() == theirs.generate(**inputs, generation_config=config).tolist()
    longer = model.generate(inputs.input_ids, config, max_new_tokens=14, min_new_tokens=14)
    assert longer.shape == (1, width + 14), "keywords come first"
    new = generated[0, width:].tolist()
    place = next(at for at in range(2, 12) if new[at] not in new[:at])
    settings = {
        "max_new_tokens": 20,
        "min_new_tokens": 2,
        "repetition_penalty": 1.3,
        "eos_token_id": [new[place], 2999],
    }
    assert model.generate(**inputs, **settings).tolist() == generated[:, : width + place + 1].tolist()
    assert theirs.generate(**inputs, **settings).tolist() == generated[:, : width + place + 1].tolist()
    assert model.generate(**inputs, max_length=width + 5, min_new_tokens=5).shape == (1, width + 5)


def test_what_nobody_says_comes_from_the_checkpoint(
    tokenizer: TernTokenizer, model: TernForCausalLM, theirs: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    inputs = tokenizer(["Hello"], return_tensors="pt")
    assert model.generate(**inputs).tolist() == theirs.generate(**inputs).tolist()  # 512 tokens at most, greedily
    for file in embedded_model_directory().iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    for generation, samples in (({"do_sample": True, "temperature": 5.0}, True), ({"temperature": 5.0}, False)):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **generation}))
        other = AutoModelForCausalLM.from_pretrained(tmp_path)
        rows = other.generate(**inputs, min_new_tokens=20, num_return_sequences=4, seed=1)
        assert rows.shape == (4, inputs.input_ids.shape[1] + 20)
        assert (len({tuple(row) for row in rows.tolist()}) > 1) == samples
        asked = other.generate(**inputs, min_new_tokens=20, num_return_sequences=4, seed=1, do_sample=True)
        assert len({tuple(row) for row in asked.tolist()}) > 1


def test_a_streamer_is_told_what_transformers_would_tell_it(
    tokenizer: TernTokenizer, model: TernForCausalLM, theirs: transformers.PreTrainedModel
) -> None:
    class Recorder(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.told: list[object] = []

        def put(self, value: torch.Tensor) -> None:
            self.told.append(value.tolist())

        def end(self) -> None:
            self.told.append("end")

    inputs = tokenizer("What is 3 + 4?", return_tensors="pt")
    ours, expected = Recorder(), Recorder()
    generated = model.generate(**inputs, max_new_tokens=12, streamer=ours)
    theirs.generate(**inputs, max_new_tokens=12, do_sample=False, streamer=expected)
    assert ours.told == expected.told
    text = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=12, streamer=text)
    completion = generated[0, inputs.input_ids.shape[1] :]
    assert "".join(text) == tokenizer.decode(completion, skip_special_tokens=True)
    with pytest.raises(InvalidRequestError, match="streamer was given with 2 sequences"):
        model.generate(**inputs, num_return_sequences=2, streamer=ours)

    class Broken(Recorder):
        def put(self, value: torch.Tensor) -> None:
            if value.dim() == 1:
                raise BrokenPipeError("gone")

    with pytest.raises(BrokenPipeError):
        model.generate(**inputs, max_new_tokens=12, streamer=Broken())
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_mistakes_are_named(tokenizer: TernTokenizer, model: TernForCausalLM) -> None:
    with pytest.raises(OptionError, match="quantization_config"):
        AutoModelForCausalLM.from_pretrained(MODEL, quantization_config={})
    with pytest.raises(OptionError, match="cuda:7"):
        AutoModelForCausalLM.from_pretrained(MODEL, device_map="cuda:7")
    with pytest.raises(InvalidRequestError, match="padding=True"):
        tokenizer(["a", "a longer text"], return_tensors="pt")
    with pytest.raises(InvalidRequestError, match="'np'"):
        tokenizer(["a"], return_tensors="np")
    with pytest.raises(InvalidRequestError, match=r"\[rows, tokens\]"):
        model.generate(torch.tensor([1, 2, 3]))
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=0)
    with pytest.raises(InvalidRequestError, match="float32"):
        model.generate(torch.tensor([[1.5, 2.0]]))
    with pytest.raises(InvalidRequestError, match="list"):
        model.generate([[1, 2]])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"max_length is 3: .* above the prompt's own 3 tokens"):
        model.generate(torch.tensor([[1, 2, 3]]), max_length=3)
    for name, value in (("max_length", "9"), ("eos_token_id", 5.0), ("max_new_tokens", 1.5), ("temperature", "hot")):
        with pytest.raises(InvalidRequestError, match=str(value)):
            model.generate(torch.tensor([[1, 2, 3]]), do_sample=True, **{name: value})
    with pytest.raises(OptionError, match="num_beams is 4"):
        model.generate(torch.tensor([[1, 2, 3]]), num_beams=4)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="num_beams is 4"):
        model.generate(torch.tensor([[1, 2, 3]]), transformers.GenerationConfig(num_beams=4))
    with pytest.raises(OptionError, match="max_new_tokns"):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokns=4)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="generation_config is 7"):
        model.generate(torch.tensor([[1, 2, 3]]), 7)
