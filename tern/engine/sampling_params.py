"""What a caller may ask of sampling, in vLLM's names, and the range of each value. Knows no tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from tern.engine.structured_outputs import StructuredOutputsParams
from tern.errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 4096
MAX_STOP_TOKENS = 1024
MAX_BIASED_TOKENS = 1024
MAX_BAD_WORDS = 1024
GREEDY_TEMPERATURE = 1e-5  # below this the likeliest token has all the probability; dividing by it would overflow
MIN_REPETITION_PENALTY = 0.01  # logits are divided by it: far smaller ones would leave the range of float32
SEED_RANGE = (-(2**63), 2**63 - 1)


@dataclass
class SamplingParams:
    """How the tokens of one request are chosen. The first fields stand in vLLM's order.

    `temperature` 0 is greedy. `max_tokens` None means as many as fit the model. `stop` and `bad_words` are text: the
    front door resolves them with its tokenizer, the engine itself only sees token ids. `reasoning_max_tokens` bounds
    the thought of a chat. `structured_outputs` is text too: the form that the answer must have. `logprobs` k asks for
    the k most likely tokens of every step beside the chosen one.

    Raises `InvalidRequestError` that names the field, the value and its range, when it is made and when a field is set.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    _: KW_ONLY
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[str] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    reasoning_max_tokens: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._check()
        self.__dict__["_checked"] = True

    def __setattr__(self, name: str, value: object) -> None:
        if name not in type(self).__dataclass_fields__:
            raise AttributeError(f"SamplingParams has no field {name!r}.")
        before = dict(self.__dict__)
        self.__dict__[name] = value
        if "_checked" in before:
            try:
                self._check()
            except InvalidRequestError:
                self.__dict__.update(before)
                raise

    def clone(self) -> SamplingParams:
        """A copy that can be changed by itself."""
        return replace(self)

    def _check(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _listed("stop", self.stop)
        self.__dict__.update(
            stop=stop,
            stop_token_ids=_listed("stop_token_ids", self.stop_token_ids),
            bad_words=_listed("bad_words", self.bad_words),
            logit_bias=_mapped("logit_bias", self.logit_bias),
        )
        self._check_ranges()
        self._check_collections(stop)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken at every step."""
        return self.temperature < GREEDY_TEMPERATURE

    def _check_ranges(self) -> None:
        _integer("n", self.n, 1, MAX_CHOICES)
        _number("temperature", self.temperature, 0.0, 10.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, 10.0)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            _boolean(name, getattr(self, name))
        if self.seed is not None:
            _integer("seed", self.seed, *SEED_RANGE)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {self.min_tokens} but max_tokens is {self.max_tokens}: "
                "lower the one or raise the other.",
                param="min_tokens",
            )
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.reasoning_max_tokens is not None:
            _integer("reasoning_max_tokens", self.reasoning_max_tokens, 0, 2**31 - 1)

        form = self.structured_outputs
        if form is not None and not isinstance(form, StructuredOutputsParams):
            raise InvalidRequestError(
                f"structured_outputs is {form!r:.60}: it must be StructuredOutputsParams.", param="structured_outputs"
            )

    def _check_collections(self, stop: tuple[str, ...]) -> None:
        _size("stop", len(stop), MAX_STOP_STRINGS)
        for text in stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise InvalidRequestError(
                    f"stop contains {str(text)[:40]!r}: "
                    f"each stop string must be text of 1 to {MAX_STOP_LENGTH} characters.",
                    param="stop",
                )
        _size("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKENS)
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)
        _size("bad_words", len(self.bad_words), MAX_BAD_WORDS)
        for word in self.bad_words:
            if not isinstance(word, str) or not word:
                raise InvalidRequestError(
                    f"bad_words contains {word!r:.40}: each must be a word, as text.", param="bad_words"
                )
        _size("logit_bias", len(self.logit_bias), MAX_BIASED_TOKENS)
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, 2**31 - 1)
            _number("logit_bias", bias, -100.0, 100.0)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(
            f"{name} is {value!r:.80}: it must be a whole number from {low} to {high}.", param=name
        )


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not low <= value <= high or (open_low and value == low):  # type: ignore[operator]
        bounds = f"above {low:g} and at most {high:g}" if open_low else f"from {low:g} to {high:g}"
        raise InvalidRequestError(f"{name} is {value!r:.80}: it must be a number {bounds}.", param=name)


def _boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{name} is {value!r:.80}: it must be true or false.", param=name)


def _listed(name: str, value: object) -> tuple[Any, ...]:
    """A list as a tuple; None is an empty one, and text is no list of letters."""
    if value is None:
        return ()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InvalidRequestError(f"{name} is {value!r:.80}: it must be a list.", param=name)
    return tuple(value)


def _mapped(name: str, value: object) -> dict[Any, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise InvalidRequestError(f"{name} is {value!r:.80}: it must map token ids to numbers.", param=name)
    return dict(value or {})


def _size(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequestError(f"{name} has {count} entries: at most {limit} are allowed.", param=name)
