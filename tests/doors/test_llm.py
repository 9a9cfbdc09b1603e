"""The offline door in vLLM's form, on the embedded model."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import tern
from tern import LLM, SamplingParams
from tern.errors import ContextLengthError, InvalidRequestError, OptionError

GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPTS = ["<|im_start|>user\nWhat is 12 + 34?", "北京的天气", "a"]


def test_the_public_names_are_there_and_nothing_else() -> None:
    for name in tern.__all__:
        assert getattr(tern, name) is not None
    with pytest.raises(AttributeError, match="Engine"):
        _ = tern.Engine  # type: ignore[attr-defined]


def test_one_prompt_or_many_in_order(llm: LLM) -> None:
    many = llm.generate(PROMPTS, GREEDY)
    assert [output.prompt for output in many] == PROMPTS
    for prompt, output in zip(PROMPTS, many, strict=True):
        [alone] = llm.generate(prompt, GREEDY)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        assert alone.prompt_token_ids == output.prompt_token_ids == llm.get_tokenizer().encode(prompt)


def test_a_prompt_may_be_token_ids(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(PROMPTS[0])
    by_ids, by_text, by_dict = llm.generate([{"prompt_token_ids": ids}, PROMPTS[0], {"prompt": PROMPTS[0]}], GREEDY)
    assert by_ids.prompt is None
    assert by_ids.outputs[0].token_ids == by_text.outputs[0].token_ids == by_dict.outputs[0].token_ids


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS[:2], [SamplingParams(temperature=0, max_tokens=3, ignore_eos=True), GREEDY])
    assert len(outputs[0].outputs[0].token_ids) == 3
    assert outputs[0].outputs[0].finish_reason == "length"
    with pytest.raises(InvalidRequestError, match="2 entries for 3 prompts"):
        llm.generate(PROMPTS, [GREEDY, GREEDY])


def test_choices_share_a_prompt_and_differ_by_seed(llm: LLM) -> None:
    params = SamplingParams(temperature=5.0, seed=7, n=4, max_tokens=12, ignore_eos=True)
    [first], [again] = llm.generate("Hello", params), llm.generate("Hello", params)
    texts = [choice.text for choice in first.outputs]
    assert [choice.index for choice in first.outputs] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert texts == [choice.text for choice in again.outputs]


def test_a_repeated_prompt_is_cached(llm: LLM) -> None:
    prompt = "A sentence that no other test says. " * 12
    [cold], [warm] = llm.generate(prompt, GREEDY), llm.generate(prompt, GREEDY)
    assert cold.num_cached_tokens == 0
    assert warm.num_cached_tokens > 0
    assert cold.outputs[0].token_ids == warm.outputs[0].token_ids


def test_logprobs_are_those_of_the_chosen_and_the_likeliest(llm: LLM) -> None:
    [output] = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=5, logprobs=3))
    choice = output.outputs[0]
    assert choice.logprobs is not None
    assert len(choice.logprobs) == len(choice.token_ids)
    for token, candidates in zip(choice.token_ids, choice.logprobs, strict=True):
        assert candidates[token].rank == 1  # greedy takes the likeliest
        assert len(candidates) == 3
        assert all(math.isfinite(each.logprob) and each.logprob <= 0 for each in candidates.values())
    assert choice.cumulative_logprob == pytest.approx(
        sum(candidates[token].logprob for token, candidates in zip(choice.token_ids, choice.logprobs, strict=True))
    )


def test_prompt_logprobs_are_what_each_token_would_have_had_as_an_answer(llm: LLM) -> None:
    prompt = llm.get_tokenizer().encode("What is 12 + 34? 北京")
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2)
    [whole], [bare] = llm.generate({"prompt_token_ids": prompt}, params), llm.generate("a", GREEDY)
    assert bare.prompt_logprobs is None
    assert whole.prompt_logprobs is not None
    assert whole.prompt_logprobs[0] is None
    assert len(whole.outputs[0].token_ids) == 2
    for place in range(1, len(prompt)):
        one = SamplingParams(temperature=0, max_tokens=1, logprobs=2, allowed_token_ids=[prompt[place]])
        [answered] = llm.generate({"prompt_token_ids": prompt[:place]}, one)
        assert answered.outputs[0].token_ids == [prompt[place]]
        assert answered.outputs[0].logprobs == [whole.prompt_logprobs[place]]


def test_a_chat_is_scored_as_it_is_rendered(llm: LLM) -> None:
    [scored] = llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=0, prompt_logprobs=0, n=2))
    assert scored.prompt_logprobs is not None
    assert [list(each or {}) for each in scored.prompt_logprobs[1:]] == [
        [token] for token in scored.prompt_token_ids[1:]
    ]
    assert [(out.text, out.token_ids, out.finish_reason) for out in scored.outputs] == [("", [], "length")] * 2


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    [free] = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    text = free.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    [stopped] = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=[stop]))
    assert stopped.outputs[0].text == text[: text.index(stop)]
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].stop_reason == stop


def test_a_stop_string_waits_for_min_tokens(llm: LLM) -> None:
    params: dict[str, Any] = {"temperature": 3.0, "seed": 1, "max_tokens": 20, "ignore_eos": True}
    [free] = llm.generate("Hello", SamplingParams(**params))
    texts = [llm.get_tokenizer().decode([token]) for token in free.outputs[0].token_ids]
    place = next(at for at in range(2, 19) if texts[at].isalpha() and texts[at] not in "".join(texts[:at]))
    for fewest in (1, place + 1, place + 2, 20):
        [held] = llm.generate("Hello", SamplingParams(**params, min_tokens=fewest, stop=[texts[place]]))
        assert len(held.outputs[0].token_ids) >= fewest
        assert held.outputs[0].token_ids == free.outputs[0].token_ids[: len(held.outputs[0].token_ids)]
        assert (len(held.outputs[0].token_ids) == place + 1) == (fewest <= place + 1)


def test_calls_from_several_threads_take_turns(llm: LLM) -> None:
    alone = [llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: llm.generate(prompt, GREEDY), PROMPTS))
    assert [output.outputs[0].token_ids for [output] in together] == alone


def test_the_text_of_a_stop_token_is_kept_when_asked_for(llm: LLM) -> None:
    [free] = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    token = free.outputs[0].token_ids[2]
    texts = {}
    for include in (False, True):
        params = SamplingParams(temperature=0, stop_token_ids=[token], include_stop_str_in_output=include)
        [output] = llm.generate("Hello", params)
        assert output.outputs[0].stop_reason == token
        texts[include] = output.outputs[0].text
    assert texts[True] == texts[False] + llm.get_tokenizer().token_text(token)


def test_a_bad_word_does_not_appear(llm: LLM) -> None:
    [free] = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    token = llm.get_tokenizer().decode(free.outputs[0].token_ids[:1])
    [held] = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, bad_words=[token]))
    assert held.outputs[0].token_ids[0] != free.outputs[0].token_ids[0]


def test_a_wrong_prompt_refuses_the_call_and_leaves_the_model_usable(llm: LLM) -> None:
    with pytest.raises(ContextLengthError, match="2048"):
        llm.generate(["fine", {"prompt_token_ids": [5] * 3000}], GREEDY)
    with pytest.raises(InvalidRequestError, match="prompt"):
        llm.generate([{"text": "no such key"}], GREEDY)  # type: ignore[list-item]
    with pytest.raises(InvalidRequestError, match="token id 1000000000"):
        llm.generate({"prompt_token_ids": [10**9]}, GREEDY)
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate({"prompt_token_ids": []}, GREEDY)
    assert llm.generate("fine", GREEDY)[0].finished


@pytest.mark.parametrize(
    "prompts", [None, 5, [1, 2, 3], [[1, 2, 3]], {"prompt": 5}, {"prompt_token_ids": None}, {"prompt_token_ids": [1.5]}]
)
def test_what_is_no_prompt_is_refused_in_words(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidRequestError, match="prompt"):
        llm.generate(prompts, GREEDY)


@pytest.mark.parametrize("messages", [None, 5, "hi", {"role": "user", "content": "hi"}, [None], [[]]])
def test_what_is_no_conversation_is_refused_in_words(llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidRequestError, match="messages"):
        llm.chat(messages, GREEDY)


@pytest.mark.parametrize("params", [{"max_tokens": 3}, [{"max_tokens": 3}], 7])
def test_sampling_params_must_be_what_they_are_called(llm: LLM, params: Any) -> None:
    with pytest.raises(InvalidRequestError, match="sampling_params"):
        llm.generate(["a"], params)


def test_token_ids_may_come_in_an_array(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(PROMPTS[0])
    [by_list] = llm.generate({"prompt_token_ids": ids}, GREEDY)
    for array in (np.array(ids), torch.tensor(ids)):
        [output] = llm.generate({"prompt_token_ids": array}, GREEDY)  # type: ignore[typeddict-item]
        assert output == replace(by_list, request_id=output.request_id, num_cached_tokens=output.num_cached_tokens)
        assert all(type(token) is int for token in output.prompt_token_ids)


def test_keywords_of_vllm_that_mean_nothing_here_are_accepted() -> None:
    llm = LLM(
        dtype=torch.float32,
        tensor_parallel_size=1,
        swap_space=4,
        trust_remote_code=True,
        max_queue=4,
        max_model_len=64,
        progress=False,
    )
    assert llm.max_model_len == 64
    with pytest.raises(OptionError, match="tensor_parallel_size is 2"):
        LLM(tensor_parallel_size=2)


def test_keywords_of_vllm_that_are_for_a_gpu_are_options() -> None:
    llm = LLM(gpu_memory_utilization=0.5, enforce_eager=True, max_model_len=64, device="cpu", progress=False)
    assert (llm._engine.options.gpu_memory_utilization, llm._engine.options.enforce_eager) == (0.5, True)
    with pytest.raises(OptionError, match="gpu_memory_utilization is 90"):
        LLM(gpu_memory_utilization=90, progress=False)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(OptionError, match="max_modle_len"):
        LLM(max_modle_len=5, progress=False)
    with pytest.raises(OptionError, match="float12"):
        LLM(dtype="float12", progress=False)


def test_a_chat_keeps_thought_and_answer_apart(llm: LLM) -> None:
    [output] = llm.chat(
        [{"role": "user", "content": "What is 12 + 34?"}], SamplingParams(temperature=0, max_tokens=400)
    )
    choice = output.outputs[0]
    assert choice.message is not None
    assert choice.message.reasoning_content
    assert "46" in (choice.message.content or "")
    assert "</think>" not in (choice.message.content or "")
    assert choice.finish_reason == "stop"


def test_many_chats_equal_each_alone(llm: LLM) -> None:
    chats = [[{"role": "user", "content": f"What is {number} + 5?"}] for number in (3, 40, 500)]
    params = SamplingParams(temperature=0, max_tokens=300)
    together = [output.outputs[0].token_ids for output in llm.chat(chats, params)]
    assert together == [llm.chat(chat, params)[0].outputs[0].token_ids for chat in chats]


def test_thinking_can_be_switched_off_and_bounded(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Who are you?"}]
    params = SamplingParams(temperature=0, max_tokens=200)
    [off] = llm.chat(messages, params, chat_template_kwargs={"enable_thinking": False})
    assert off.outputs[0].message is not None
    assert off.outputs[0].message.reasoning_content is None
    assert off.outputs[0].message.content
    bounded = SamplingParams(temperature=0, max_tokens=200, reasoning_max_tokens=3)
    [short] = llm.chat(messages, bounded)
    assert short.outputs[0].message is not None
    assert short.outputs[0].message.content


def test_an_empty_conversation_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="messages"):
        llm.chat([], GREEDY)
