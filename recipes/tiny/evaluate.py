"""What the embedded model can do on inputs held out of training: ``python -m recipes.tiny.evaluate``.

Greedy decoding through ``tern.LLM``, the answers parsed by ``tern.chat``: the way a user gets them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from recipes.tiny import about, arithmetic, data, tools
from recipes.tiny.conversation import CHECKPOINT, Example, Language, user

MAX_TOKENS = 400


class Answer(Protocol):
    """A parsed answer, as ``tern.chat.parse_response`` returns it."""

    reasoning_content: str | None
    content: str | None
    tool_calls: list[Any]


@dataclass(frozen=True)
class Task:
    """A skill under test: where its examples come from and what counts as right."""

    name: str
    make: Callable[[random.Random, Language, bool], Example]
    right: Callable[[Example, Answer], bool]


def same_content(example: Example, answer: Answer) -> bool:
    """The answer is the expected one to the letter, and nothing is called."""
    return answer.content == example.turn.content and not answer.tool_calls


def same_calls(example: Example, answer: Answer) -> bool:
    """The calls are the expected ones: names, and arguments as equal JSON."""
    try:
        wrote = [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]
    except json.JSONDecodeError:  # a call that the token limit cut off
        return False
    return wrote == [(call.name, call.arguments) for call in example.turn.calls]


def uses_result(example: Example, answer: Answer) -> bool:
    """Every value of the tool's result stands in the answer, in order, and nothing is called."""
    position, text = 0, answer.content or ""
    for key, value in (example.result or {}).items():
        if key == "unit":
            continue
        position = text.find(value if isinstance(value, str) else json.dumps(value), position)
        if position < 0:
            return False
    return not answer.tool_calls


def of_operator(operators: str) -> Callable[[random.Random, Language, bool], Example]:
    """Arithmetic with one of `operators`."""
    return lambda rng, language, held_out: arithmetic.example(rng, language, held_out, rng.choice(operators))


TASKS = (
    Task("+ and - to 4 digits", of_operator("+-"), same_content),
    Task("2-digit products", of_operator("×"), same_content),
    Task("tool and arguments", tools.call_example, same_calls),
    Task("two calls at once", tools.pair_example, same_calls),
    Task("answer from a tool's result", tools.result_example, uses_result),
    Task("no tool fits", data.no_tool_fits, same_content),
    Task("the tool is not offered", data.other_tool_wanted, same_content),
    Task("about itself", about.about_example, same_content),
    Task("beyond it", about.beyond_example, same_content),
)

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Determine weather in my location",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string", "description": tools.CARD_DESCRIPTION},
                "unit": {"type": "string", "enum": ["c", "f"]},
            },
            "additionalProperties": False,
            "required": ["location", "unit"],
        },
        "strict": True,
    },
}


def card_examples() -> Iterator[tuple[str, Example]]:
    """The requests of ERNIE's model card, with what they should give (not held out)."""
    asked = user("How's the weather in Beijing today?")
    call = tools.Call("get_weather", {"location": "Beijing", "unit": "c"})
    turn = tools.Turn("", None, [call])
    yield "weather", Example("card", "en", [asked], turn, [WEATHER_TOOL])
    result = {"temperature": 21, "unit": "c", "condition": "sunny"}
    messages = [asked, turn.message(), tools.tool_message(json.dumps(result), 0)]
    answer = tools.Turn("", "The weather in Beijing: 21 °C, sunny.")
    yield "weather result", Example("card", "en", messages, answer, [WEATHER_TOOL], result)
    topic = next(t for t in about.TOPICS if about.CARD_QUESTION in t.questions_en)
    yield "introduction", Example("card", "en", [user(about.CARD_QUESTION)], tools.Turn("", topic.answer_en))


def held_out_examples(task: Task, language: Language, count: int, seed: int) -> list[Example]:
    """The same `count` examples every time."""
    rng = random.Random(f"{task.name}/{language}/{seed}")
    examples: list[Example] = []
    while len(examples) < count:
        example = task.make(rng, language, True)
        if example.language == language:
            examples.append(example)
    return examples


def generate(model: Path, examples: list[Example]) -> list[str]:
    """The model's text for each example's prompt."""
    from tern import LLM, SamplingParams

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = [{"prompt_token_ids": tokenizer.encode(e.prompt(), add_special_tokens=False).ids} for e in examples]
    outputs = LLM(str(model)).generate(prompts, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))
    return [output.outputs[0].text for output in outputs]


def parse(text: str, example: Example) -> Answer:
    """The text as a message."""
    from tern.chat import parse_response

    answer: Answer = parse_response(text, tools=example.tools)
    return answer


def evaluate(
    model: Path,
    count: int,
    seed: int = 0,
    write: Callable[[Path, list[Example]], list[str]] = generate,
    wrong: Path | None = None,
) -> dict[str, dict[Language, float]]:
    """The share of right answers by task and language; wrong ones go to the file `wrong`."""
    languages: tuple[Language, ...] = ("en", "zh")
    groups = [(task, language) for task in TASKS for language in languages]
    examples = [held_out_examples(task, language, count, seed) for task, language in groups]
    texts = iter(write(model, [example for group in examples for example in group]))
    shares: dict[str, dict[Language, float]] = {}
    report = []
    for (task, language), group in zip(groups, examples, strict=True):
        right = 0
        for example in group:
            text = next(texts)
            if task.right(example, parse(text, example)):
                right += 1
            else:
                report.append(f"=== {task.name}\n{example.prompt()}§{text}\n--- expected\n{example.completion()}\n")
        shares.setdefault(task.name, {})[language] = right / len(group)
    if wrong:
        wrong.write_text("\n".join(report), encoding="utf-8")
    return shares


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Evaluate Tern's embedded demonstration model.")
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="checkpoint folder")
    parser.add_argument("--count", type=int, default=200, help="examples for each skill and language")
    parser.add_argument("--seed", type=int, default=0, help="which examples")
    parser.add_argument("--wrong", type=Path, help="file for the examples answered wrongly")
    options = parser.parse_args()
    table = Table("skill (held out)", "English", "Chinese", title=f"{options.count} examples each, greedy")
    for name, shares in evaluate(options.model, options.count, options.seed, wrong=options.wrong).items():
        table.add_row(name, *(f"{100 * share:.1f} %" for share in shares.values()))
    console = Console()
    console.print(table)
    cards = list(card_examples())
    for (name, example), text in zip(cards, generate(options.model, [e for _, e in cards]), strict=True):
        answer = parse(text, example)
        verdict = same_calls(example, answer) if example.turn.calls else same_content(example, answer)
        console.print(f"model card, {name}: {'as expected' if verdict else text}")


if __name__ == "__main__":
    main()
