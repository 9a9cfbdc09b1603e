"""The embedded model's recipe: its data, its layout of a chat, its network and a short training run."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Ernie4_5_MoeForCausalLM

from recipes.tiny import about, arithmetic, data, evaluate, tools
from recipes.tiny.conversation import CHECKPOINT, END_OF_TURN, Call, Example, Language, Turn, render, user
from recipes.tiny.network import ROWS, TinyErnie, assign, save_checkpoint, tiny_config
from recipes.tiny.optimizer import orthogonalise
from recipes.tiny.team import Team
from recipes.tiny.tokenizer import TAGS
from recipes.tiny.train import SMOKE, Trainer, smoke_config, train

LANGUAGES: tuple[Language, ...] = ("en", "zh")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, list[float]]:
    """The smoke version of the whole training."""
    return train(SMOKE, tmp_path_factory.mktemp("tiny"), Team(), smoke=True)


# --- data ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 9999), st.integers(0, 9999))
def test_sums_and_differences_are_worked_out_correctly(a: int, b: int) -> None:
    for operator, value in (("+", a + b), ("-", a - b)):
        turn = arithmetic.solve(a, operator, b, "en")
        assert turn.content == f"{a} {operator} {b} = {value}."
        assert turn.reasoning.endswith(f"= {value}")
        check_equations(turn.reasoning)


@given(st.integers(0, 99), st.integers(0, 99))
def test_products_are_worked_out_correctly(a: int, b: int) -> None:
    turn = arithmetic.solve(a, "×", b, "zh")
    assert turn.content == f"{a} × {b} = {a * b}。"
    check_equations(turn.reasoning)


def check_equations(thought: str) -> None:
    """Every `x+y+z=w` in a thought holds."""
    for match in re.finditer(r"(\d+(?:[-+*]\d+)+)=(\d+)", thought):
        terms = [int(term) if term.isdigit() else term for term in re.split(r"([-+*])", match[1])]
        value = terms[0]
        for operator, term in zip(terms[1::2], terms[2::2], strict=True):
            value = {"+": value + term, "-": value - term, "*": value * term}[operator]
        assert value == int(match[2]), match[0]


def test_training_and_evaluation_share_no_arithmetic_problem() -> None:
    rng = random.Random(0)
    for operator in "+-×":
        trained = {arithmetic.problem(rng, operator, False) for _ in range(3000)}
        held_out = {arithmetic.problem(rng, operator, True) for _ in range(500)}
        assert not trained & held_out


@pytest.mark.parametrize("language", LANGUAGES)
def test_training_and_evaluation_share_no_tool_word(language: Language) -> None:
    def names(held_out: bool) -> set[str]:
        rng, found = random.Random(1), set[str]()
        for _ in range(400):
            asked = tools.plain_request(rng, language, held_out)
            found |= {asked.about.topic, asked.about.name}
            for p in asked.given:
                found |= {p.name, *(p.choices or [])}
                if p.kind in ("place", "person", "code"):
                    found.add(p.value)
        return found

    assert not names(True) & names(False)


@pytest.mark.parametrize("language", LANGUAGES)
def test_training_and_evaluation_share_no_question_about_the_model(language: Language) -> None:
    for topic in about.TOPICS:
        held_out = set(topic.phrasings(language, True))
        assert held_out
        assert not held_out & set(topic.phrasings(language, False))


@pytest.mark.parametrize("make", list(data.MIXTURE), ids=lambda make: make.__name__)
@pytest.mark.parametrize("language", LANGUAGES)
def test_calls_satisfy_the_schema_they_are_for(make: data.Generator, language: Language) -> None:
    rng = random.Random(2)
    for held_out in (False, True):
        for _ in range(100):
            example = make(rng, language, held_out)
            offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in example.tools}
            assert len(offered) == len(example.tools)
            for call in example.turn.calls:
                check_call(call, offered[call.name])


def check_call(call: Call, schema: tools.Tool) -> None:
    """Required arguments are there, none is unknown, enums hold."""
    assert set(schema.get("required", [])) <= set(call.arguments) <= set(schema["properties"])
    for name, value in call.arguments.items():
        rule = schema["properties"][name]
        assert isinstance(value, {"string": str, "integer": int, "number": (int, float)}[rule["type"]])
        assert value in rule.get("enum", [value])


def test_mentioned_values_stand_in_the_question() -> None:
    rng = random.Random(3)
    for language in LANGUAGES:
        for _ in range(300):
            asked = tools.request(rng, language, False)
            for p in asked.given:
                assert not p.mentioned or str(p.value) in asked.text


def test_unseen_words_for_parameters_stand_in_the_schema() -> None:
    """Nobody could know that 画质 is `quality` if neither training nor the tool's description said so."""
    rng = random.Random(8)
    for _ in range(300):
        asked = tools.plain_request(rng, "zh", True)
        properties = asked.tool["function"]["parameters"]["properties"]
        for p in asked.given:
            if tools.spoken_otherwise(p.name, p.spoken):
                assert properties[p.name]["description"] == p.spoken
                assert f"{p.name}（{p.spoken}）: " in tools.call_turn(asked, [asked.tool], "zh").reasoning


# --- layout --------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "查询", "parameters": {"type": "object", "properties": {}}}}


def test_prompt_layout_with_everything() -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        user("Ask the tool."),
        Turn("It fits.", "I ask.", [Call("查询", {"地点": "北京"})]).message(),
        tools.tool_message('{"ok": true}', 0),
    ]
    assert render(messages, [TOOL]) == (
        "<|im_start|>system\n<system_setting>\nBe brief.\n</system_setting>\n\n"
        "<global_setting>\nthink_mode=True\n</global_setting>\n\n"
        f"<tool_list>\n[{json.dumps(TOOL, ensure_ascii=False)}]\n</tool_list><|im_end|>\n\n"
        "<|im_start|>user\nAsk the tool.<|im_end|>\n\n"
        "<|im_start|>assistant\n<think>\nIt fits.\n</think>\n<response>\nI ask.\n</response>\n"
        '\n<tool_call>\n{"name": "查询", "arguments": {"地点": "北京"}}\n</tool_call>\n<|im_end|>\n\n'
        '<|im_start|>user\n<tool_response>\n{"ok": true}\n</tool_response><|im_end|>\n\n'
        "<|im_start|>assistant\n<think>\n"
    )


def test_prompt_layout_plain_and_without_thinking() -> None:
    plain = "<|im_start|>system\n<global_setting>\nthink_mode=True\n</global_setting><|im_end|>\n\n"
    plain += "<|im_start|>user\nHi<|im_end|>\n\n<|im_start|>assistant\n<think>\n"
    assert render([user("Hi")]) == plain
    assert render([user("Hi")], enable_thinking=False) == plain + "\n</think>\n\n<response>\n"


def test_controls_leave_a_completion_that_continues_the_prompt() -> None:
    def asking() -> Example:
        call = Turn("This is about it: f\nx: 1", None, [Call("f", {"x": 1})])
        return Example("tool call", "en", [user("?")], call, [TOOL])

    silent = data.without_thinking(asking())
    assert silent.prompt() == render(silent.messages, silent.tools, enable_thinking=False)
    assert silent.completion().startswith("<tool_call>\n")
    spoken = data.without_thinking(about.about_example(random.Random(0), "zh", False))
    assert spoken.prompt() == render(spoken.messages, enable_thinking=False)
    cut = data.with_thought_cut(asking(), 7)
    closing = "This is\n\nI have thought long enough; I will answer now with what I have.\n</think>\n\n<response>\n"
    assert cut.prompt().endswith(f"<think>\n{closing}")
    assert cut.completion().startswith("I call f.\n</response>\n\n<tool_call>\n")


def test_transformers_renders_the_template_alike() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    rng = random.Random(4)
    for _ in range(50):
        example = data.training_example(rng)
        text = tokenizer.apply_chat_template(
            example.messages, tools=example.tools or None, tokenize=False, add_generation_prompt=True
        )
        assert text + example.opening == example.prompt()


def test_embedded_tokenizer_keeps_tags_and_digits_single() -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    for tag in (*TAGS, "<|im_start|>", "<|im_end|>", *"0123456789"):
        assert len(tokenizer.encode(tag).ids) == 1
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "<s>", "</s>")] == [0, 1, 2]
    text = '4783 in "New York", 北京 <think>\n\n€'
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text


def test_a_drill_is_its_questions_one_after_another_and_only_answers_are_targets() -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    rng = random.Random(7)
    for _ in range(60):
        questions = data.drill(rng)
        sequence = data.encode_drill(questions, tokenizer, 0.0)
        text = tokenizer.decode(sequence.ids, skip_special_tokens=False)
        assert text.startswith(questions[0].prompt())
        assert text.count("<global_setting>") == 1
        targets = [token for token, weight in zip(sequence.ids, sequence.weights, strict=True) if weight]
        answers = "".join(question.completion() for question in questions)
        assert tokenizer.decode(targets, skip_special_tokens=False) == answers
        offered = {tool["function"]["name"] for tool in questions[0].tools}
        assert {call.name for question in questions for call in question.turn.calls} <= offered


# --- network and training ------------------------------------------------------------------------------------------


def test_assignment_is_a_padded_permutation() -> None:
    chosen = torch.stack([torch.randperm(16)[:4] for _ in range(300)])
    source, place, counts = assign(chosen, 16)
    assert all(count % ROWS == 0 for count in counts)
    assert torch.equal(source[place], torch.arange(1200))
    assert (source == 1200).sum() == len(source) - 1200
    owners = torch.repeat_interleave(torch.arange(16), torch.tensor(counts))
    assert torch.equal(owners[place], chosen.flatten())


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    for shape in ((4, 32, 64), (64, 32)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
        assert values.min() > 0.5
        assert values.max() < 1.5


def perturbed(compute_dtype: torch.dtype) -> TinyErnie:
    """A network of the smoke size with a correction bias that changes which experts are chosen."""
    torch.manual_seed(5)
    model = TinyErnie(smoke_config(tiny_config(300, [2, 4])), compute_dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    for router in model.routers():
        router.e_score_correction_bias.normal_(std=0.3)
    return model.eval()


def test_saved_checkpoint_has_transformers_logits(tmp_path: Path) -> None:
    model = perturbed(torch.float32)
    save_checkpoint(model, tmp_path)
    other, report = Ernie4_5_MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    ids = torch.randint(5, 300, (3, 70))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), other(ids).logits, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    model = perturbed(torch.float32)
    save_checkpoint(model, tmp_path)
    other = Ernie4_5_MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(5, 300, (2, 40))
    for logits in (model(ids), other(ids).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    moe = other.model.layers[1].mlp
    ours = model.layers[1].mlp
    for mine, theirs in (
        (ours.experts.gate_up_proj, moe.experts.gate_up_proj),
        (ours.experts.down_proj, moe.experts.down_proj),
        (ours.gate.weight, moe.gate.weight),
        (model.embed_tokens.weight, other.model.embed_tokens.weight),
    ):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_smoke_training_lowers_the_loss_and_resumes(smoke: tuple[Trainer, list[float]]) -> None:
    trainer, losses = smoke
    assert sum(losses[-5:]) / 5 < 0.7 * sum(losses[:5]) / 5
    assert any(router.e_score_correction_bias.any() for router in trainer.model.routers())
    resumed = Trainer(trainer.plan, trainer.model.config, trainer.tokenizer, trainer.run, Team())
    assert resumed.step == trainer.step
    for mine, saved in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, saved)


def test_smoke_checkpoint_loads_in_transformers(smoke: tuple[Trainer, list[float]]) -> None:
    folder = smoke[0].run / "checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Ernie4_5_MoeForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([user("1+1")], add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=4)
    assert output.shape[1] <= prompt["input_ids"].shape[1] + 4
    assert model.generation_config.eos_token_id == [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]


# --- the published model -------------------------------------------------------------------------------------------


def test_embedded_checkpoint_is_whole_and_small() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 20e6
    model, report = Ernie4_5_MoeForCausalLM.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not any(report.values())
    assert model.config.moe_num_experts >= 16
    assert model.config.moe_k >= 4
    assert model.config.moe_layer_start_index == 1
    assert all(layer.mlp.gate.moe_statics.e_score_correction_bias.any() for layer in model.model.layers[1:])


def test_scoring_tells_right_from_wrong() -> None:
    rng = random.Random(6)
    for task in evaluate.TASKS:
        example = evaluate.held_out_examples(task, "en", 1, seed=0)[0]
        assert task.right(example, evaluate.parse(example.completion().removesuffix(END_OF_TURN), example))
        other = arithmetic.example(rng, "en", True).completion().removesuffix(END_OF_TURN)
        assert not task.right(example, evaluate.parse(other, example))


def test_embedded_model_answers_the_card_and_uses_results() -> None:
    cards = [example for _, example in evaluate.card_examples()]
    texts = evaluate.generate(CHECKPOINT, cards)
    assert evaluate.same_calls(cards[0], evaluate.parse(texts[0], cards[0]))
    assert evaluate.uses_result(cards[1], evaluate.parse(texts[1], cards[1]))
    assert evaluate.same_content(cards[2], evaluate.parse(texts[2], cards[2]))


def test_embedded_model_calculates_and_reads_results_on_held_out_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    least = {"+ and - to 4 digits": 0.9, "2-digit products": 0.8, "answer from a tool's result": 0.75}
    monkeypatch.setattr(evaluate, "TASKS", [task for task in evaluate.TASKS if task.name in least])
    for task, shares in evaluate.evaluate(CHECKPOINT, count=20).items():
        assert sum(shares.values()) / 2 >= least[task], (task, shares)
