"""The transformers door beside transformers itself, on the embedded model."""

from __future__ import annotations

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
    arguments = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "seed": 3, "num_return_sequences": 3}
    first, again = (model.generate(**inputs, **arguments) for _ in range(2))
    assert first.shape[0] == 3
    assert first.tolist() == again.tolist()
    assert len({tuple(row) for row in first.tolist()}) > 1


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
    with pytest.raises(TypeError, match="num_beams"):
        model.generate(torch.tensor([[1, 2, 3]]), num_beams=4)  # type: ignore[call-arg]
