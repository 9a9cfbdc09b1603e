"""vLLM's and FastDeploy's `speculative_config` in Tern's own options. Knows names and values; decides nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tern.errors import OptionError

METHODS = {
    "ngram": "ngram",
    "[ngram]": "ngram",
    "ngram_match": "ngram",
    "mtp": "mtp",
    "ernie_mtp": "mtp",
}
"""What others call the methods, and what they are here."""

SETTINGS = ("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max")
"""Of the same name and meaning here."""


def options_of(config: Mapping[str, Any] | str) -> dict[str, Any]:
    """The engine options that a `speculative_config` stands for, as a mapping or as JSON text.

    Raises `OptionError` that names what Tern does not know; a draft model, for instance, it does not run.
    """
    settings = _parsed(config) if isinstance(config, str) else config
    if not isinstance(settings, Mapping):
        raise OptionError(
            f"speculative_config is {_shown(config)}: give an object such as "
            '{"method": "ngram", "num_speculative_tokens": 5}.'
        )
    unknown = [name for name in settings if name not in ("method", *SETTINGS)]
    if unknown:
        raise OptionError(
            f"speculative_config has {_shown(unknown[0])}, which Tern does not know: leave it out, known are method, "
            f"{', '.join(SETTINGS)}."
        )
    method = settings.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise OptionError(f"speculative_config's method is {_shown(method)}: it must be ngram or mtp.")
    given = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
    if "prompt_lookup_max" in given:  # in vLLM a bound that stands alone is both
        given.setdefault("prompt_lookup_min", given["prompt_lookup_max"])
    elif "prompt_lookup_min" in given:
        given["prompt_lookup_max"] = given["prompt_lookup_min"]
    return {"speculation": METHODS[method], **given}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise OptionError(f"speculative_config is {_shown(text)}: it is not valid JSON.") from None


def _shown(value: object) -> str:
    return repr(value)[:80]
