"""JSON Schemas made by a program: objects, arrays with bounds, unions, enums, references, patterns, keys in any script.

Every value has an end in sight (bounded lengths, no free numbers), so that an answer of a hot model ends, too.
"""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]


def random_schema(rng: random.Random, depth: int = 3) -> Schema:
    """A schema of an object, at most `depth` levels deep."""
    definitions = {"leaf": _leaf(rng), "pair": {"type": "array", "prefixItems": [_leaf(rng), _leaf(rng)],
                                                 "minItems": 2, "items": False}}  # fmt: skip
    return {"$defs": definitions, **_object(rng, depth)}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(
        ["name", "城市", "count", "tags", "単位", "a b", "x-y", "деталь", "ok", 'quo"te'], rng.randint(1, 3)
    )
    return {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names},
        "required": names[: rng.randint(1, len(names))],
        "additionalProperties": False,
    }


def _value(rng: random.Random, depth: int) -> Schema:
    kinds = ["leaf", "leaf", "enum", "ref", "const"] + (["object", "array", "union"] if depth > 0 else [])
    match rng.choice(kinds):
        case "object":
            return _object(rng, depth)
        case "array":
            low = rng.randint(0, 2)
            return {"type": "array", "items": _value(rng, depth - 1), "minItems": low, "maxItems": low + 2}
        case "union":
            return {"anyOf": [{"type": "null"}, _value(rng, depth - 1), _leaf(rng)]}
        case "enum":
            return {"enum": rng.sample(["北京", "</response>", "<tool_call>", 3, None, True, -1.5, "c"], 3)}
        case "const":
            return {"const": {"k": [1, "二"]}}
        case "ref":
            return {"$ref": rng.choice(["#/$defs/leaf", "#/$defs/pair"])}
    return _leaf(rng)


def _leaf(rng: random.Random) -> Schema:
    return rng.choice(
        [
            {"type": "string", "maxLength": rng.randint(1, 12)},
            {"type": "string", "pattern": "^[A-Z]{2}-\\d{1,4}$"},
            {"type": "integer", "minimum": -9, "maximum": 999},
            {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
            {"type": "boolean"},
            {"type": ["string", "null"], "maxLength": 5},
            {"type": "string", "format": "date"},
        ]
    )
