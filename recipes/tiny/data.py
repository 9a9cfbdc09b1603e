"""The training mixture: which skills, how often, in what variations, as batches of token ids.

Text is generated as training goes, so no example is seen twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from recipes.tiny import about, arithmetic, tools, words
from recipes.tiny.conversation import Example, Language, Message, user, with_thought_cut, without_thinking

Generator = Callable[[random.Random, Language, bool], Example]

MAX_LENGTH = 1024
LENGTH_STEP = 32
DIGIT_WEIGHT = 3.0
"""Weight of a digit as a target in arithmetic, where the other tokens are easy."""
DRILL_SHARE = 0.65
"""Share of drills among the conversations."""
POOL = 1024
"""Examples drawn at a time, sorted by length and cut into batches of equal-sized sequences."""

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a helpful assistant that answers briefly.",
    "You are ERNIE, an assistant made by Baidu.",
    "Answer the user's question.",
    "Use the tools when they help.",
    "你是一个有用的助手。",
    "请简短回答。",
    "必要时使用工具。",
)


def no_tool_fits(rng: random.Random, language: Language, held_out: bool) -> Example:
    """Tools are offered, but the question is for none of them."""
    skill = rng.choices((arithmetic.example, about.about_example, about.beyond_example), weights=(3, 3, 4))[0]
    example = skill(rng, language, held_out)
    offer: list[tools.Request] = []
    example.tools = tools.distractors(rng, language, held_out, offer, rng.randint(1, 3))
    example.turn.reasoning = f"{about.NO_TOOL[language]}\n{example.turn.reasoning}"
    example.skill = "no tool fits"
    return example


def other_tool_wanted(rng: random.Random, language: Language, held_out: bool) -> Example:
    """A question that some tool would answer, but that tool is not there."""
    asked = tools.request(rng, language, held_out)
    offer = tools.distractors(rng, language, held_out, [asked], rng.randint(0, 2))
    turn = about.beyond_example(rng, language, held_out).turn
    if offer:
        turn.reasoning = f"{about.NO_TOOL[language]}\n{turn.reasoning}"
    return Example("no tool fits", language, [user(asked.text)], turn, offer)


MIXTURE: dict[Generator, float] = {
    arithmetic.example: 12,
    tools.call_example: 40,
    tools.result_example: 14,
    tools.failure_example: 2,
    tools.pair_example: 3,
    tools.pair_result_example: 1,
    about.about_example: 8,
    about.beyond_example: 4,
    no_tool_fits: 4,
    other_tool_wanted: 4,
}
PLAIN: dict[Generator, float] = {arithmetic.example: 4, about.about_example: 2, about.beyond_example: 2}
DRILL: dict[Generator, float] = {arithmetic.example: 6, about.about_example: 2, about.beyond_example: 1}


def draw(rng: random.Random, mixture: dict[Generator, float], language: Language) -> Example:
    """An example of a skill chosen by weight, on the training side."""
    return rng.choices(list(mixture), weights=list(mixture.values()))[0](rng, language, False)


def history(rng: random.Random, language: Language) -> list[Message]:
    """One or two finished turns about other things."""
    messages: list[Message] = []
    for _ in range(rng.choice((1, 1, 2))):
        earlier = draw(rng, PLAIN, language)
        messages += [*earlier.messages, earlier.turn.message()]
    return messages


def after_tool_use(rng: random.Random, example: Example) -> Example:
    """`example`, or another call, asked after an earlier question was answered with a tool."""
    earlier = tools.result_example(rng, example.language, False)
    names = {tool["function"]["name"] for tool in earlier.tools}
    if example.skill == "tool call":
        asked = tools.request(rng, example.language, False)
        if asked.about.name in names:
            return example
        example.tools = rng.sample([asked.tool, *earlier.tools], len(earlier.tools) + 1)
        example.messages = [user(asked.text)]
        example.turn = tools.call_turn(asked, example.tools, example.language)
    else:
        offered = {tool["function"]["name"] for tool in example.tools}
        example.tools += [tool for tool in earlier.tools if tool["function"]["name"] not in offered]
    example.messages = [*earlier.messages, earlier.turn.message(), *example.messages]
    return example


def training_example(rng: random.Random) -> Example:
    """One example in one of the variations that requests come in."""
    language: Language = rng.choice(("en", "zh"))
    example = draw(rng, MIXTURE, language)
    draw_history = rng.random()
    if draw_history < 0.1:
        example.messages = history(rng, language) + example.messages
    elif draw_history < 0.12 and example.skill in ("tool call", "no tool fits"):
        example = after_tool_use(rng, example)
    if rng.random() < 0.12:
        role = rng.choice(("system", "system", "developer"))
        example.messages = [{"role": role, "content": rng.choice(SYSTEM_MESSAGES)}, *example.messages]
    control = rng.random()
    if control < 0.015:
        return without_thinking(example)
    if control < 0.025:
        return with_thought_cut(example, rng.randint(0, len(example.turn.reasoning)))
    return example


def without_tools(rng: random.Random, language: Language, held_out: bool) -> Example:
    """A question of the kind that a drill mixes, for a prompt that offers tools."""
    if rng.random() < 0.5:
        example = other_tool_wanted(rng, language, held_out)
        example.turn.reasoning = example.turn.reasoning.removeprefix(f"{about.NO_TOOL[language]}\n")
    else:
        example = draw(rng, DRILL, language)
    example.turn.reasoning = f"{about.NO_TOOL[language]}\n{example.turn.reasoning}"
    return example


def drill(rng: random.Random) -> list[Example]:
    """Several questions under one prompt, each to be answered with its thought: more to learn from every token.

    Most drills offer tools and ask one question for each, some also one that none of the tools is for.
    """
    language: Language = rng.choice(("en", "zh"))
    if rng.random() < 0.12:
        return [draw(rng, DRILL, language) for _ in range(rng.randint(3, 6))]
    requests: list[tools.Request] = []
    count = rng.choice((1, 2, 2, 3, 3))
    while len(requests) < count:
        asked = tools.request(rng, language, False)
        taken = {r.about.topic for r in requests} | {r.about.name for r in requests}
        if not taken & {asked.about.topic, asked.about.name}:
            requests.append(asked)
    offer = rng.sample([asked.tool for asked in requests], count)
    questions = [
        Example("tool call", language, [user(asked.text)], tools.call_turn(asked, offer, language))
        for asked in requests
    ]
    if rng.random() < 0.35:
        questions.append(without_tools(rng, language, False))
    rng.shuffle(questions)
    questions[0].tools = offer
    return questions


@dataclass
class Sequence:
    """Token ids with the weight of each as a target."""

    ids: list[int]
    weights: list[float]
    skill: str


def encode(example: Example, tokenizer: Tokenizer, prompt_weight: float) -> Sequence:
    """Prompt and completion as the engine sees them: tokenised apart, then joined."""
    return encode_turn(example, example.prompt(), tokenizer, prompt_weight)


def encode_turn(example: Example, prompt: str, tokenizer: Tokenizer, prompt_weight: float) -> Sequence:
    """`example`'s turn after `prompt`."""
    before = tokenizer.encode(prompt, add_special_tokens=False).ids
    completion = tokenizer.encode(example.completion(), add_special_tokens=False)
    digit_weight = 1.0
    if example.skill in ("sum", "product"):
        digit_weight = 0.0 if example.opening else DIGIT_WEIGHT  # without the thought the digits are a guess
    weights = [digit_weight if token.isdigit() else 1.0 for token in completion.tokens]
    return Sequence(before + completion.ids, [prompt_weight] * len(before) + weights, example.skill)


def encode_drill(questions: list[Example], tokenizer: Tokenizer, prompt_weight: float) -> Sequence:
    """Questions and answers in one sequence; only the first is preceded by the system's part and the tools."""
    first, *others = questions
    whole = encode(first, tokenizer, prompt_weight)
    for example in others:
        prompt = example.prompt()
        asked = "\n\n" + prompt[prompt.index("<|im_start|>user") :]
        turn = encode_turn(example, asked, tokenizer, prompt_weight)
        whole = Sequence(whole.ids + turn.ids, whole.weights + turn.weights, f"drill: {first.skill}")
    return whole


def training_sequence(rng: random.Random, tokenizer: Tokenizer, prompt_weight: float, copying_share: float) -> Sequence:
    """A copying exercise, a drill or a single example."""
    if rng.random() < copying_share:
        return copying(rng, tokenizer)
    if rng.random() < DRILL_SHARE:
        return encode_drill(drill(rng), tokenizer, prompt_weight)
    return encode(training_example(rng), tokenizer, prompt_weight)


def copying(rng: random.Random, tokenizer: Tokenizer) -> Sequence:
    """Exercises for copying by context alone: repeated nonsense, and look-ups in a list of nonsense pairs."""
    if rng.random() < 0.5:
        block = [rng.randrange(300, tokenizer.get_vocab_size()) for _ in range(rng.randint(2, 20))]
        ids = block * rng.randint(3, 5)
        return Sequence(ids, [0.0] * len(block) + [1.0] * (len(ids) - len(block)), "copying")
    pairs = [(nonsense(rng), nonsense(rng)) for _ in range(rng.randint(1, 6))]
    listing = tokenizer.encode("\n".join(f'"{key}": "{value}"' for key, value in pairs) + "\n\n").ids
    asked = rng.sample(pairs, len(pairs))
    answers = tokenizer.encode("\n".join(f"{key}: {value}" for key, value in asked)).ids
    return Sequence(listing + answers, [0.0] * len(listing) + [1.0] * len(answers), "copying")


def nonsense(rng: random.Random) -> str:
    """A made-up word, code or number."""
    makers = (words.made_up, words.made_up, words.made_up_han, words.code, lambda rng, _: str(tools.number_value(rng)))
    return rng.choice(makers)(rng, False)


@dataclass
class Batch:
    """Right-padded sequences: ids and weights [B, L], and the skill of each."""

    ids: Tensor
    weights: Tensor
    skills: list[str]


def round_up(length: int) -> int:
    """The padded length of a sequence, one more than a multiple of `LENGTH_STEP`: the last token is only a target."""
    return (length + LENGTH_STEP - 2) // LENGTH_STEP * LENGTH_STEP + 1


def pad(sequences: list[Sequence]) -> Batch:
    """Stack sequences to the longest one's length, rounded up: few distinct shapes keep the matrix library fast."""
    length = round_up(max(len(s.ids) for s in sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    weights = torch.zeros(len(sequences), length)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        weights[row, : len(sequence.ids)] = torch.tensor(sequence.weights)
    return Batch(ids, weights, [s.skill for s in sequences])


def batches(
    rng: random.Random, tokenizer: Tokenizer, tokens: int, prompt_weight: float, copying_share: float
) -> Iterator[Batch]:
    """One pool of examples as batches of at most `tokens` padded tokens, in random order."""
    pool = [training_sequence(rng, tokenizer, prompt_weight, copying_share) for _ in range(POOL)]
    pool = sorted((s for s in pool if len(s.ids) <= MAX_LENGTH), key=lambda s: len(s.ids))
    cut: list[list[Sequence]] = [[]]
    for sequence in pool:
        if round_up(len(sequence.ids)) * (len(cut[-1]) + 1) > tokens:
            cut.append([])
        cut[-1].append(sequence)
    rng.shuffle(cut)
    for sequences in cut:
        yield pad(sequences)
