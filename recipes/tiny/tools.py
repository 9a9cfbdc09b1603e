"""Questions for tools: choosing one, filling its arguments, and answering from its result.

A generated tool has a topic ("hotel", or a word that means nothing), a name and up to four parameters, each of a kind
that says how a question mentions its value. On the evaluation side topics, names, parameter names, enum values and
string values all come from the held-out side of `words`.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from recipes.tiny import words
from recipes.tiny.conversation import Call, Example, Language, Message, Tool, Turn, user

LISTED_TOPICS = 0.65
"""Share of generated tools whose topic is a real word; the others' means nothing."""
LISTED_TOPICS_IN_TRAINING = 0.5
"""The same for training, where more variety teaches copying instead of the list."""


@dataclass
class Parameter:
    """One argument of a tool, and the value a question gives it."""

    name: str
    spoken: str
    """How a question calls it."""
    kind: str
    value: Any
    choices: list[str] | None = None
    required: bool = True
    mentioned: bool = True
    obscure: bool = False
    """Nothing but a description links the name to what a question calls it."""
    description: str | None = None

    def describe(self, rng: random.Random, language: Language) -> None:
        """Give it a description for its schema."""
        place = ", e.g. San Francisco, CA" if self.kind == "place" and rng.random() < 0.3 else ""
        plain = (f"the {self.spoken}", f"{self.spoken}{place}", f"{self.spoken.capitalize()} to use{place}")
        if language == "en":
            self.description = rng.choice(plain)
        else:
            english = not self.obscure and self.name.isascii() and rng.random() < 0.15
            self.description = f"the {self.name.replace('_', ' ')}{place}" if english else self.spoken

    def schema(self, rng: random.Random) -> dict[str, Any]:
        """Its JSON schema, keys in a varying order."""
        kinds = {"number": "number" if isinstance(self.value, float) else "integer"}
        schema: dict[str, Any] = {"type": kinds.get(self.kind, "string")}
        if self.kind == "number" and rng.random() < 0.4:
            schema["type"] = "number"
        if self.choices:
            schema["enum"] = self.choices
        if self.description:
            schema["description"] = self.description
        return shuffled(rng, schema) if rng.random() < 0.3 else schema


@dataclass
class Subject:
    """What a tool is about, and how a question asks for it."""

    topic: str
    verb: str
    name: str
    description: str
    asks: str


def shuffled(rng: random.Random, mapping: dict[str, Any]) -> dict[str, Any]:
    """The same mapping with its keys in another order."""
    return dict(rng.sample(list(mapping.items()), len(mapping)))


# --- tools ---------------------------------------------------------------------------------------------------------


def tool_name(rng: random.Random, verb: str, topic: str) -> str:
    """A function name in one of the usual spellings."""
    parts = topic.split()
    snake, camel = "_".join(parts), "".join(part.capitalize() for part in parts)
    return rng.choice(
        (
            f"{verb}_{snake}",
            f"{verb}_{snake}",
            f"{verb}{camel}",
            f"{snake}_{verb}",
            f"{verb}-{snake}",
            f"{snake}",
            f"{verb}_{snake}_{rng.choice(('info', 'data', 'tool', 'v2', 'now'))}",
        )
    )


def subject(rng: random.Random, language: Language, held_out: bool) -> Subject:
    """A topic and a verb with a matching name, description and question."""
    chinese = language == "zh"
    listed = rng.random() < (LISTED_TOPICS if held_out else LISTED_TOPICS_IN_TRAINING)
    if not listed:
        topic = words.made_up(rng, held_out)
        spoken = topic if not chinese or rng.random() < 0.5 else words.made_up_han(rng, held_out)
    else:
        topic, translated = rng.choice([t for t in words.TOPICS if words.is_held_out(t[0]) == held_out])
        spoken = translated if chinese else topic
    doing = rng.random() < 0.35
    verb = rng.choice(words.DOING_VERBS if doing else words.ASKING_VERBS)
    name = tool_name(rng, verb, topic)
    if rng.random() < 0.08:
        name = f"{words.made_up(rng, held_out)}_{rng.randint(1, 99)}"
    if chinese:
        verb_zh = words.DOING_VERBS_ZH[verb] if doing else rng.choice(("查询", "获取", "查找", "查看"))
        asks = rng.choice(("帮我{}{}", "{}{}", "请{}{}", "我想{}{}", "麻烦{}一下{}", "请帮我{}{}")).format(
            verb_zh, spoken
        )
        if not doing:
            asks = rng.choice((asks, f"{spoken}怎么样", f"我想知道{spoken}", f"告诉我{spoken}", f"{spoken}是什么情况"))
        descriptions = [f"{verb_zh}{spoken}", f"{verb_zh}{spoken}", f"{spoken}{verb_zh}工具"]
        if listed and not held_out:  # training teaches that the Chinese and the English word are the same
            descriptions.append(f"{verb.capitalize()} {topic}")
        return Subject(spoken, verb, name, rng.choice(descriptions), asks)
    article = rng.choice(("the", "a", "my", "")) if doing else rng.choice(("the", "the", ""))
    phrase = " ".join(part for part in (verb, article, spoken) if part)
    asks = rng.choice(
        ("{}", "please {}", "can you {}", "I want to {}", "could you {} for me", "I'd like to {}", "help me {}")
    ).format(phrase)
    if not doing:
        asks = rng.choice(
            (asks, f"what is the {spoken}", f"how is the {spoken}", f"I need the {spoken}", f"tell me the {spoken}")
        )
    description = rng.choice((f"{verb.capitalize()} {article} {spoken}".replace("  ", " "), f"{spoken} {verb}"))
    return Subject(spoken, verb, name, description, asks)


def describe_some(rng: random.Random, language: Language, given: list[Parameter]) -> None:
    """Give descriptions to all parameters or only to those that need one."""
    all_of_them = rng.random() < 0.6
    for p in given:
        if all_of_them or p.obscure:
            p.describe(rng, language)


def function(rng: random.Random, name: str, description: str, parameters: list[Parameter]) -> Tool:
    """The tool in OpenAI's form, with the optional parts there or not."""
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {p.name: p.schema(rng) for p in parameters},
    }
    if rng.random() < 0.4:
        schema["additionalProperties"] = False
    if any(p.required for p in parameters):
        schema["required"] = [p.name for p in parameters if p.required]
    body: dict[str, Any] = {"name": name, "description": description, "parameters": schema}
    if rng.random() < 0.3:
        body["strict"] = True
    if rng.random() < 0.2:
        body["parameters"], body = shuffled(rng, schema), shuffled(rng, body)
    tool = {"type": "function", "function": body}
    return shuffled(rng, tool) if rng.random() < 0.1 else tool


# --- parameters ----------------------------------------------------------------------------------------------------


def string_value(rng: random.Random, kind: str, language: Language, held_out: bool) -> str:
    """A value for a string parameter: a known word, or one that means nothing."""
    if kind == "code":
        return words.code(rng, held_out)
    if kind == "date":
        return words.date(rng) if rng.random() < 0.6 else rng.choice(words.WEEKDAYS[language])
    if rng.random() < 0.4:
        if language == "zh" and rng.random() < 0.7:
            return words.made_up_han(rng, held_out)
        value = words.made_up(rng, held_out).capitalize()
        return value if held_out or rng.random() < 0.75 else f"{value} {words.made_up(rng, held_out).capitalize()}"
    lists = {"place": words.CITIES, "person": words.PEOPLE, "thing": words.THINGS}
    value = words.pick(rng, lists[kind][language], held_out)
    if kind == "thing" and language == "en" and rng.random() < 0.3:
        value = f"{words.pick(rng, words.THINGS['en'], held_out)} {value}"
    return value


def number_value(rng: random.Random) -> int | float:
    """Mostly small whole numbers, sometimes large ones or decimals."""
    draw = rng.random()
    if draw < 0.5:
        return rng.randint(1, 20)
    if draw < 0.85:
        return rng.randint(21, 9999)
    return rng.randint(1, 999) + rng.choice((0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 0.8, 0.9))


def enum_parameter(rng: random.Random, language: Language, held_out: bool) -> Parameter:
    """A choice among listed values; unmentioned, the first one."""
    known = [e for e in words.ENUMS if words.is_held_out(e[0]) == held_out and (language == "zh" or e[0].isascii())]
    listed = bool(known) and rng.random() < 0.5
    if listed:
        name, spoken, choices = rng.choice(known)
        choices = rng.sample(choices, rng.randint(2, len(choices)))
    else:
        name, spoken = made_up_name(rng, language, held_out)
        choices = [words.made_up(rng, held_out) for _ in range(rng.randint(2, 4))]
        if len(set(choices)) < len(choices):
            return enum_parameter(rng, language, held_out)
    mentioned = rng.random() < 0.75
    value = rng.choice(choices) if mentioned else choices[0]
    if language == "en":
        spoken = name.replace("_", " ")
    obscure = spoken_otherwise(name, spoken) and (held_out or not listed)
    return Parameter(name, spoken, "enum", value, choices, mentioned=mentioned, obscure=obscure)


def parameter(rng: random.Random, kind: str, language: Language, held_out: bool) -> Parameter:
    """A parameter of the given kind, named plainly or with a word that means nothing."""
    if kind == "enum":
        return enum_parameter(rng, language, held_out)
    known = [pair for pair in words.PARAMETERS[kind] if words.is_held_out(pair[0]) == held_out]
    listed = bool(known) and rng.random() < 0.6
    name, spoken = rng.choice(known) if listed else made_up_name(rng, language, held_out)
    if language == "en":
        spoken = name.replace("_", " ")
    value = number_value(rng) if kind == "number" else string_value(rng, kind, language, held_out)
    obscure = spoken_otherwise(name, spoken) and (held_out or not listed)
    return Parameter(name, spoken, kind, value, obscure=obscure)


def made_up_name(rng: random.Random, language: Language, held_out: bool) -> tuple[str, str]:
    """A parameter's name that means nothing, and what a question calls it."""
    name = words.made_up(rng, held_out)
    if rng.random() < 0.1:
        name = f"{name}_{words.made_up(rng, held_out)}"
    if language == "zh" and rng.random() < 0.5:
        return name, words.made_up_han(rng, held_out)
    return name, name


def spoken_otherwise(name: str, spoken: str) -> bool:
    """Whether a question calls a parameter something that its name does not show."""
    return name.replace("_", " ") != spoken.replace("_", " ")


def parameters(rng: random.Random, language: Language, held_out: bool) -> list[Parameter]:
    """None to four parameters with distinct names; a few are optional and left out of the question."""
    kinds = ["place", "person", "thing", "code", "date", "number", "number", "enum", "enum"]
    chosen = [rng.choice(kinds) for _ in range(rng.choices(range(5), weights=(3, 42, 36, 16, 3))[0])]
    drawn = [parameter(rng, kind, language, held_out) for kind in chosen]
    if len({p.name for p in drawn}) < len(drawn) or len({str(p.value) for p in drawn}) < len(drawn):
        return parameters(rng, language, held_out)
    for p in drawn:
        if p.kind != "enum" and rng.random() < 0.03:
            p.required = p.mentioned = False
        else:
            p.required = rng.random() >= 0.06
    return drawn


def mention(rng: random.Random, p: Parameter, language: Language, alone: bool) -> str:
    """The words by which a question gives a value; `alone`: no other parameter is of this kind."""
    if language == "zh":
        named = [f"{p.spoken}是{p.value}", f"{p.spoken}为{p.value}", f"{p.spoken}：{p.value}"]
        named += [f"{p.spoken}用{p.value}", f"{p.spoken}要{p.value}"]
        if not p.spoken.isascii() and str(p.value).isascii():  # elsewhere one could not tell where the value begins
            named.append(f"{p.spoken}{p.value}")
        if p.kind in ("person", "thing"):
            named.append(f"{p.spoken}是“{p.value}”")
        if alone and p.kind in ("enum", "place"):
            named += [f"{p.value}", f"要{p.value}的" if p.kind == "enum" else f"在{p.value}"]
        return rng.choice(named)
    named = [f"with {p.spoken} {p.value}", f"{p.spoken} {p.value}", f"{p.spoken}: {p.value}", f"{p.spoken} = {p.value}"]
    named += [f"the {p.spoken} is {p.value}", f"set {p.spoken} to {p.value}", f"{p.spoken} should be {p.value}"]
    named.append(f"a {p.spoken} of {p.value}")
    if p.kind in ("person", "thing"):
        named += [f'with {p.spoken} "{p.value}"', f"{p.spoken} '{p.value}'"]
    if p.kind == "number":
        named += [f"{p.value} {p.spoken}", f"for {p.value} {p.spoken}", f"with {p.value} {p.spoken}"]
    elif alone and p.kind == "place":
        named += [f"in {p.value}", f"in {p.value}", f"for {p.value}", f"at {p.value}", f"near {p.value}"]
        named += [f"to {p.value}", f"from {p.value}"]
    elif alone and p.kind == "person":
        named += [f"for {p.value}", f"by {p.value}", f"from {p.value}", f"to {p.value}", f"with {p.value}"]
    elif alone and p.kind == "date":
        named += [f"on {p.value}"]
    elif alone and p.kind == "enum":
        named += [f"in {p.value}", f"as {p.value}", f"{p.value} please", f"{p.value} {p.spoken}"]
    return rng.choice(named)


def question(rng: random.Random, about: Subject, given: list[Parameter], language: Language) -> str:
    """The user's sentence: what is asked, then the values in any order."""
    said = [p for p in given if p.mentioned]
    kinds = [p.kind for p in said]
    mentions = [mention(rng, p, language, kinds.count(p.kind) == 1) for p in rng.sample(said, len(said))]
    if language == "zh":
        place = next((p for p in said if p.kind == "place"), None)
        if len(said) == 1 and place and rng.random() < 0.5:
            ending = rng.choice(("怎么样", "如何", "", "是多少", "呢")) + rng.choice("？。 ")
            return f"{place.value}的{about.topic}{ending}".strip()
        text = "，".join([about.asks, *mentions]) if rng.random() < 0.8 else "，".join([*mentions, about.asks])
        return text + rng.choice(("。", "", "？", "，谢谢。"))
    joint = rng.choice((", ", " ", " and ", ", "))
    text = about.asks + (" " if rng.random() < 0.7 else ", ") * bool(mentions) + joint.join(mentions)
    if rng.random() < 0.6:
        text = text[0].upper() + text[1:]
    return text + rng.choice((".", "?", "", " please", ", thanks."))


def gloss(p: Parameter) -> str:
    """A Chinese description, repeated in the thought: the question will use its word and not the name."""
    shown = p.description and not p.description.isascii() and p.description != p.name
    return f"（{p.description}）" if shown else ""


def list_tools(tools: list[Tool]) -> str:
    """The tools that a thought chooses from, numbered; nothing where there is no choice."""
    if len(tools) < 2:
        return ""
    functions = [tool["function"] for tool in tools]
    return "".join(f"{number} {f['name']}: {f['description']}\n" for number, f in enumerate(functions, 1))


def think_call(asked: Request, tools: list[Tool], language: Language) -> str:
    """Which of the tools, its parameters numbered in the schema's order, then each with its value."""
    english = language == "en"
    given, chosen = asked.given, asked.about.name
    if len(tools) > 1:
        names = [tool["function"]["name"] for tool in tools]
        chosen = f"{names.index(chosen) + 1} {chosen}"
    lines = [f"This is about {asked.about.topic}: {chosen}" if english else f"问的是{asked.about.topic}：{chosen}"]
    if given:
        lines.append(" ".join(f"{number} {p.name}" for number, p in enumerate(given, 1)))
    for number, p in enumerate(given, 1):
        value = json.dumps(p.value, ensure_ascii=False)
        if p.required and not p.mentioned:
            value = f"not said, first is {value}" if english else f"没说，取第一个 {value}"
        elif not p.mentioned:
            value = "not said, left out" if english else "没说，不填"
        lines.append(f"{number} {p.name}{gloss(p)}: {value}")
    return "\n".join(lines)


def call_for(name: str, given: list[Parameter]) -> Call:
    """The call: mentioned parameters and required ones, in the schema's order."""
    return Call(name, {p.name: p.value for p in given if p.mentioned or p.required})


# --- examples ------------------------------------------------------------------------------------------------------

WEATHER_QUESTIONS = {
    "en": (
        "How's the weather in {} today?",
        "What's the weather in {}?",
        "What is the weather like in {} today?",
        "How is the weather in {}?",
        "weather in {}",
        "{} weather",
        "Tell me the weather in {} right now.",
        "Is it raining in {}?",
        "Is it cold in {} today?",
        "Do I need an umbrella in {}?",
        "Will it be sunny in {}?",
        "I'm going to {}. How's the weather there?",
        "Can you check the weather for {}?",
        "How hot is it in {}?",
    ),
    "zh": (
        "{}今天天气怎么样？",
        "{}天气怎么样？",
        "{}今天的天气如何？",
        "{}天气",
        "查一下{}的天气",
        "{}现在下雨吗？",
        "我要去{}，那里天气怎么样？",
        "{}今天冷不冷？",
        "今天{}天气好吗？",
        "请告诉我{}的天气。",
        "在{}需要带伞吗？",
    ),
}
CARD_DESCRIPTION = "The city and state e.g. San Francisco, CA"
"""What ERNIE's model card says of its weather tool's parameter."""
UNITS = (["c", "f"], ["celsius", "fahrenheit"], ["f", "c"], ["metric", "imperial"])


@dataclass
class Request:
    """A question, the tool that fits it and the arguments it asks for."""

    about: Subject
    given: list[Parameter]
    tool: Tool
    text: str


def weather_request(rng: random.Random, language: Language, held_out: bool) -> Request:
    """The model card's kind of request: a weather tool with a place and, mostly, a unit."""
    place = Parameter(
        rng.choice(("location", "location", "city", "place")),
        "city" if language == "en" else "城市",
        "place",
        string_value(rng, "place", language, held_out),
    )
    given = [place]
    if rng.random() < 0.8:
        choices = UNITS[0] if rng.random() < 0.5 else rng.choice(UNITS)
        spoken = "unit" if language == "en" else "单位"
        given.append(Parameter("unit", spoken, "enum", choices[0], choices, mentioned=False))
    if rng.random() < 0.2:
        given.reverse()
    name = rng.choice(("get_weather", "get_weather", "get_current_weather", "weather", "getWeather", "query_weather"))
    describe_some(rng, language, given)
    if rng.random() < 0.2:
        place.description = CARD_DESCRIPTION
    topic = "weather" if language == "en" else "天气"
    descriptions = ("Determine weather in my location", "Get the current weather", "Weather by city", "查询天气")
    about = Subject(topic, "get", name, rng.choice(descriptions), "")
    text = rng.choice(WEATHER_QUESTIONS[language]).format(place.value)
    if len(given) == 2 and rng.random() < 0.25:
        unit = next(p for p in given if p.name == "unit")
        unit.mentioned, unit.value = True, rng.choice(unit.choices or [])
        text += f" In {unit.value}." if language == "en" else f"单位用{unit.value}。"
    return Request(about, given, function(rng, name, about.description, given), text)


def plain_request(rng: random.Random, language: Language, held_out: bool) -> Request:
    """A question for a generated tool."""
    about, given = subject(rng, language, held_out), parameters(rng, language, held_out)
    describe_some(rng, language, given)
    tool = function(rng, about.name, about.description, given)
    return Request(about, given, tool, question(rng, about, given, language))


def request(rng: random.Random, language: Language, held_out: bool) -> Request:
    """A question for any tool."""
    if not held_out and rng.random() < 0.2:
        return weather_request(rng, language, held_out)
    return plain_request(rng, language, held_out)


def distractors(
    rng: random.Random, language: Language, held_out: bool, wanted: list[Request], count: int
) -> list[Tool]:
    """Tools about other topics than the wanted ones."""
    tools: list[Tool] = []
    topics = {r.about.topic for r in wanted} | {r.about.name for r in wanted}
    while len(tools) < count:
        other = plain_request(rng, language, held_out)
        if other.about.topic not in topics and other.about.name not in topics:
            topics |= {other.about.topic, other.about.name}
            tools.append(other.tool)
    return tools


def offered(rng: random.Random, language: Language, held_out: bool, wanted: Request) -> list[Tool]:
    """One to three tools in any order, the wanted one among them."""
    count = rng.choices((0, 1, 2), weights=(4, 4, 3))[0]
    tools = [wanted.tool, *distractors(rng, language, held_out, [wanted], count)]
    return rng.sample(tools, len(tools))


def call_turn(asked: Request, tools: list[Tool], language: Language) -> Turn:
    """The turn that calls the wanted one of the tools."""
    reasoning = list_tools(tools) + think_call(asked, tools, language)
    return Turn(reasoning, None, [call_for(asked.about.name, asked.given)])


def call_example(rng: random.Random, language: Language, held_out: bool) -> Example:
    """Choose a tool and fill its arguments."""
    asked = request(rng, language, held_out)
    tools = offered(rng, language, held_out, asked)
    return Example("tool call", language, [user(asked.text)], call_turn(asked, tools, language), tools)


def pair_example(rng: random.Random, language: Language, held_out: bool) -> Example:
    """The same question for two places: two calls in one turn."""
    asked = weather_request(rng, language, held_out)
    first = next(p for p in asked.given if p.kind == "place")
    other = first.value
    while other == first.value:
        other = string_value(rng, "place", language, held_out)
    joint = rng.choice((" and ", " and in ")) if language == "en" else "和"
    text = asked.text.replace(first.value, f"{first.value}{joint}{other}", 1)
    calls, thoughts = [], []
    tools = offered(rng, language, held_out, asked)
    for place in (first.value, other):
        first.value = place
        thoughts.append(think_call(asked, tools, language))
        calls.append(call_for(asked.about.name, asked.given))
    turn = Turn(list_tools(tools) + "\n".join(thoughts), None, calls)
    return Example("two calls", language, [user(text)], turn, tools)


# --- results -------------------------------------------------------------------------------------------------------

CONDITIONS = {
    "en": ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "clear", "stormy"),
    "zh": ("晴", "多云", "阴", "小雨", "大雪", "有雾", "大风", "雷阵雨"),
}


def weather_result(rng: random.Random, language: Language, given: list[Parameter], held_out: bool) -> dict[str, Any]:
    """What a weather service answers."""
    unit = next((p.value for p in given if p.kind == "enum"), "c")
    result: dict[str, Any] = {rng.choice(("temperature", "temperature", "temp")): rng.randint(-25, 42)}
    if rng.random() < 0.8:
        result["unit"] = unit
    if rng.random() < 0.8:
        conditions = CONDITIONS[language if rng.random() < 0.7 else "en"]
        result[rng.choice(("condition", "condition", "weather", "sky"))] = rng.choice(conditions)
    if rng.random() < 0.3:
        result["humidity"] = rng.randint(5, 100)
    if rng.random() < 0.3:
        result[words.made_up(rng, held_out)] = number_value(rng)
    return shuffled(rng, result) if rng.random() < 0.3 else result


def plain_result(rng: random.Random, language: Language, held_out: bool) -> dict[str, Any]:
    """One to four fields of any kind."""
    result: dict[str, Any] = {}
    kinds = ("place", "person", "thing", "code", "date", "number", "number")
    for _ in range(rng.choices((1, 2, 3, 4), weights=(3, 4, 3, 1))[0]):
        p = parameter(rng, rng.choice(kinds), language, held_out)
        result[p.name] = p.value
    return result


def say(key: str, value: Any, language: Language) -> str:
    """One field of a result in words."""
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"{key.replace('_', ' ')} {shown}" if language == "en" else f"{key.replace('_', ' ')}：{shown}"


def say_result(result: dict[str, Any], asked: Request, language: Language) -> str:
    """The answer: what was asked, then every field of the result in order."""
    fields = dict(result)
    parts = []
    unit = fields.get("unit")
    for key, value in fields.items():
        if key in ("temperature", "temp") and unit in ("c", "f"):
            parts.append(f"{value} °{unit.upper()}")
        elif key == "unit" and unit in ("c", "f") and ("temperature" in fields or "temp" in fields):
            continue
        elif key in ("condition", "weather", "sky"):
            parts.append(str(value))
        else:
            parts.append(say(key, value, language))
    place = next((p.value for p in asked.given if p.kind == "place" and p.mentioned), None)
    if language == "zh":
        where = f"{place}的" if place else ""
        return f"{where}{asked.about.topic}：{'，'.join(parts)}。"
    where = f" in {place}" if place else ""
    return f"The {asked.about.topic}{where}: {', '.join(parts)}."


def tool_message(text: str, number: int) -> Message:
    """A tool's result in the history."""
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": text}


def result_example(rng: random.Random, language: Language, held_out: bool) -> Example:
    """After the call came back: answer from the result."""
    weather = rng.random() < (0.2 if held_out else 0.45)
    asked = (weather_request if weather else plain_request)(rng, language, held_out)
    tools = offered(rng, language, held_out, asked)
    called = call_turn(asked, tools, language)
    result = weather_result(rng, language, asked.given, held_out) if weather else plain_result(rng, language, held_out)
    messages = [user(asked.text), called.message(), tool_message(json.dumps(result, ensure_ascii=False), 0)]
    if rng.random() < 0.1:
        called.reasoning = ""
        messages[1] = called.message()
    thought = "The tool has answered." if language == "en" else "工具已返回结果。"
    turn = Turn(thought, say_result(result, asked, language))
    return Example("tool result", language, messages, turn, tools, result)


def failure_example(rng: random.Random, language: Language, held_out: bool) -> Example:
    """After the call failed, or came back as plain text."""
    asked = request(rng, language, held_out)
    thing = string_value(rng, "thing", language, held_out)
    if rng.random() < 0.6:
        reason = rng.choice(("not found", "timeout", "permission denied", f"unknown {thing}", f"{thing} is closed"))
        returned = rng.choice((json.dumps({"error": reason}, ensure_ascii=False), f"Error: {reason}"))
        content = f"The tool failed: {reason}." if language == "en" else f"工具出错了：{reason}。"
        thought = "The tool failed." if language == "en" else "工具出错了。"
    else:
        returned = rng.choice((thing, f"{thing} {number_value(rng)}", str(number_value(rng))))
        content = f"The {asked.about.topic}: {returned}." if language == "en" else f"{asked.about.topic}：{returned}。"
        thought = "The tool has answered." if language == "en" else "工具已返回结果。"
    tools = offered(rng, language, held_out, asked)
    messages = [user(asked.text), call_turn(asked, tools, language).message(), tool_message(returned, 0)]
    return Example("tool failure", language, messages, Turn(thought, content), tools)


def pair_result_example(rng: random.Random, language: Language, held_out: bool) -> Example:
    """Two results, one sentence for each."""
    example = pair_example(rng, language, held_out)
    example.messages.append(example.turn.message())
    topic = "weather" if language == "en" else "天气"
    sentences = []
    for number, call in enumerate(example.turn.calls):
        place = next(v for k, v in call.arguments.items() if k != "unit")
        given = [Parameter("place", "", "place", place)]
        if "unit" in call.arguments:
            given.append(Parameter("unit", "", "enum", call.arguments["unit"]))
        result = weather_result(rng, language, given, held_out)
        example.messages.append(tool_message(json.dumps(result, ensure_ascii=False), number))
        asked = Request(Subject(topic, "", "", "", ""), given, {}, "")
        sentences.append(say_result(result, asked, language))
    thought = "The tool has answered." if language == "en" else "工具已返回结果。"
    example.turn = Turn(thought, (" " if language == "en" else "").join(sentences))
    example.skill = "two results"
    return example
