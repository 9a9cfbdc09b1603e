"""Tern's offline door as a model of the lm-evaluation-harness.

Knows the harness's `TemplateLM` and `tern.LLM`. A chat travels through the harness as JSON text, because the harness
passes prompts on as strings; its answer is the part behind the thought.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import track

from tern.engine import SamplingParams
from tern.errors import InvalidRequestError
from tern.llm import LLM, RequestOutput

AT_ONCE = 64
"""Prompts given to the engine together: their scores are all kept until the last one ends."""

TASK_TOKENS = 256
"""The longest plain answer where a task sets no limit, as in the harness's own models."""

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
"""Generation keywords of tasks that mean the same here."""

Scored = tuple[float, bool]
Item = TypeVar("Item")


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness is untyped
    """Answers and scores the harness's requests with `llm`.

    With `chat` each generation is a conversation, `max_tokens` limits thought and answer together (default: the
    model's length) in place of the task's own limit, which is made for plain continuations; stop strings count behind
    the thought. Without it a task's limit holds unless `max_tokens` is given.
    """

    def __init__(
        self, llm: LLM, name: str, *, chat: bool, thinking: bool = True, max_tokens: int | None = None
    ) -> None:
        super().__init__()
        self._llm = llm
        self._name = name
        self._chat = chat
        self._thinking = thinking
        self._max_tokens = max_tokens
        self._encode = llm.get_tokenizer().encode

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        tokenizer = self._llm.get_tokenizer()
        return tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.pad_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that is scored from its first token."""
        begin = self._llm.get_tokenizer().bos_id
        return begin if begin is not None else self.eot_token_id

    @property
    def max_length(self) -> int:
        """The longest text, in tokens, whose next token can be scored."""
        return self._llm.max_model_len - 1

    @property
    def tokenizer_name(self) -> str:
        """What the harness keys its cache of prompts with."""
        return self._name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Nothing for the harness to render: conversations stay what they are until `generate_until`."""
        return "" if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], **_: Any) -> str:
        """The conversation as JSON."""
        return json.dumps(chat_history, ensure_ascii=False)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text."""
        return self._encode(string, add_special_tokens=bool(add_special_tokens))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, cut before its first stop string."""
        answers: list[str] = []
        for part in _in_parts(requests, "Answering", quiet=disable_tqdm):
            params = [self._params(request.args[1]) for request in part]
            prompts = [request.args[0] for request in part]
            outputs = self._answer_chats(prompts, params) if self._chat else self._llm.generate(prompts, params, False)
            answers += [self._text(output) for output in outputs]
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of the model's length where it is longer."""
        totals = []
        for request in requests:
            windows = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            scored = self._loglikelihood_tokens([(("", ""), *window) for window in windows], disable_tqdm)
            totals.append(sum(logprob for logprob, _ in scored))
        return totals

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[Scored]:
        """The log-probability of each continuation, and whether greedy decoding would write it."""
        if self._chat:
            raise InvalidRequestError(
                f"{requests[0].task_name} compares how likely given texts are, which has no meaning behind a thought: "
                "leave out --chat.",
                param="chat",
            )
        scored: list[Scored] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        scored: list[Scored] = []
        for part in _in_parts(requests, "Scoring", quiet=disable_tqdm):
            texts = [(context + continuation)[-self._llm.max_model_len :] for _, context, continuation in part]
            outputs = self._llm.generate([{"prompt_token_ids": text} for text in texts], params, False)
            scored += [_score(output, len(request[2])) for output, request in zip(outputs, part, strict=True)]
        return scored

    def _answer_chats(self, prompts: Sequence[str], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        template = None if self._thinking else {"enable_thinking": False}
        conversations = [json.loads(prompt) for prompt in prompts]
        return self._llm.chat(conversations, params, False, chat_template_kwargs=template)

    def _params(self, wanted: Mapping[str, Any]) -> SamplingParams:
        given = normalize_gen_kwargs(dict(wanted), TASK_TOKENS)
        limit = self._max_tokens if self._chat or self._max_tokens is not None else given["max_gen_toks"]
        fields = {name: given[name] for name in SAMPLING_FIELDS if given.get(name) is not None}
        stop = [text for text in given["until"] if text]
        return SamplingParams(max_tokens=limit, stop=stop, **fields)

    def _text(self, output: RequestOutput) -> str:
        choice = output.outputs[0]
        if choice.finish_reason == "error":
            raise InvalidRequestError(f"A prompt was not answered: {choice.error}")
        return choice.text if choice.message is None else choice.message.content or ""


def _score(output: RequestOutput, num_tokens: int) -> Scored:
    """The sum over the last `num_tokens` of a scored prompt, and whether each of them was the likeliest."""
    assert output.prompt_logprobs is not None
    chosen = [next(iter(each.values())) for each in output.prompt_logprobs[-num_tokens:] if each]
    return sum(each.logprob for each in chosen), all(each.rank == 1 for each in chosen)


def _in_parts(items: Sequence[Item], what: str, *, quiet: bool) -> Iterator[Sequence[Item]]:
    """The items, `AT_ONCE` together, with a bar on a terminal."""
    starts: Iterable[int] = range(0, len(items), AT_ONCE)
    console = Console(stderr=True)
    for start in track(starts, what, console=console, disable=quiet or not console.is_terminal):
        yield items[start : start + AT_ONCE]
