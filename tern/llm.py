"""The offline front door: prompts or chats in, finished outputs back, in vLLM's form.

Knows the engine and the text protocol; knows no HTTP. Everything runs in the calling thread; calls from several
threads take turns.
"""

from __future__ import annotations

import itertools
import logging
import operator
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypedDict

from tern.chat import (
    AnswerForm,
    AnswerRules,
    ChatProtocol,
    CompiledGrammar,
    GrammarCompiler,
    RenderedPrompt,
    Tokenizer,
    bad_word_sequences,
)
from tern.checkpoint import resolve_model
from tern.engine import Engine, EngineOptions, Request, SamplingParams
from tern.errors import InvalidRequestError, OptionError
from tern.offline.jobs import Collector, Job, output_of
from tern.offline.outputs import CompletionOutput, Logprob, RequestOutput
from tern.offline.progress import ProgressBar

if TYPE_CHECKING:
    import torch

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput"]

logger = logging.getLogger(__name__)

NO_MEANING_HERE = frozenset({"swap_space", "trust_remote_code", "disable_log_stats"})
"""Keywords of vLLM's `LLM` that change nothing here: accepted, with a line in the log."""


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: list[int]


Prompt = str | TextPrompt | TokensPrompt
Conversation = Sequence[Mapping[str, Any]]


class LLM:
    """A model that answers prompts and chats in this process.

    `model` is a directory, a hub id, `dummy:PRESET` or None for the embedded model; `dtype` is "auto" (the
    checkpoint's), "float32", "bfloat16" or "float16", or torch's own dtype. Other keywords are `EngineOptions` fields;
    those of vLLM that have no meaning here (`NO_MEANING_HERE`, one-device parallelism) are accepted. Unknown keywords
    raise `OptionError`; a model that cannot be opened raises `CheckpointError`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        hf_token: str | None = None,
        tensor_parallel_size: int = 1,
        progress: bool = True,
        **engine_options: Any,
    ) -> None:
        if tensor_parallel_size != 1:
            raise OptionError(
                f"tensor_parallel_size is {tensor_parallel_size}: Tern runs on one device, so leave it 1."
            )
        for name in NO_MEANING_HERE & engine_options.keys():
            del engine_options[name]
            logger.info("%s does nothing here", name)
        options = EngineOptions.for_one_caller(**engine_options, dtype=str(dtype).removeprefix("torch."))
        source = resolve_model(model, revision=revision, token=hf_token, progress=progress)
        self._engine = Engine.open(source, options, progress=progress)
        self._protocol = ChatProtocol.from_directory(source.directory, source.text_files)
        self._generation = source.generation
        self._grammars = GrammarCompiler(self.get_tokenizer(), source.generation.eos_token_ids)
        self._ids = itertools.count()
        self._lock = threading.Lock()

    @property
    def max_model_len(self) -> int:
        """The longest prompt and completion together, in tokens."""
        return self._engine.max_model_len

    def get_tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return self._protocol.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` and `chat` use when given none: the checkpoint's own defaults, as many tokens as fit."""
        return SamplingParams(max_tokens=None, **self._generation.sampling_defaults())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt; outputs come in the order of the prompts.

        `sampling_params` is one for all or one for each. `use_tqdm` shows a progress bar on a terminal. Raises
        `InvalidRequestError` before anything runs if any prompt or parameter is wrong.
        """
        batch = list(prompts) if isinstance(prompts, Iterable) and not isinstance(prompts, str | Mapping) else [prompts]
        params = self._params_for(len(batch), sampling_params)
        jobs = [self._completion_job(prompt, each) for prompt, each in zip(batch, params, strict=True)]
        return self._run(jobs, show_progress=use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer each conversation; `outputs[i].message` holds reasoning, content and tool calls apart.

        `messages` is one conversation (a list of OpenAI messages) or a list of them. `stop` strings count only after
        the thought. The arguments of strict tools, and `structured_outputs`, hold behind it. Raises as `generate`.
        """
        many = isinstance(messages, list | tuple) and messages and not isinstance(messages[0], Mapping)
        conversations: Sequence[Conversation] = messages if many else [messages]  # type: ignore[assignment,list-item]
        params = self._params_for(len(conversations), sampling_params)
        jobs = [
            self._chat_job(conversation, each, tools, chat_template_kwargs)
            for conversation, each in zip(conversations, params, strict=True)
        ]
        return self._run(jobs, show_progress=use_tqdm)

    def _params_for(
        self, count: int, given: SamplingParams | Sequence[SamplingParams] | None
    ) -> Sequence[SamplingParams]:
        if given is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if not isinstance(given, Sequence) or not all(isinstance(each, SamplingParams) for each in given):
            raise InvalidRequestError(
                f"sampling_params is {given!r:.80}: give one SamplingParams for all, or a list with one for each.",
                param="sampling_params",
            )
        if len(given) != count:
            raise InvalidRequestError(
                f"sampling_params has {len(given)} entries for {count} prompts: give one for all, or one for each.",
                param="sampling_params",
            )
        return given

    def _completion_job(self, prompt: Prompt, params: SamplingParams) -> Job:
        text, token_ids = self._read_prompt(prompt)
        form = AnswerForm.of(params.structured_outputs)
        return self._job(text, token_ids, params, grammar=self._grammars.for_text(form))

    def _read_prompt(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        given: Mapping[str, Any] = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
        if (token_ids := given.get("prompt_token_ids")) is not None:
            return None, _whole_numbers(token_ids)
        if isinstance(text := given.get("prompt"), str):
            return text, self.get_tokenizer().encode(text)
        raise InvalidRequestError(
            f'A prompt must be text, {{"prompt": text}} or {{"prompt_token_ids": [...]}}, but it is {prompt!r:.80}.',
            param="prompts",
        )

    def _chat_job(
        self,
        messages: Conversation,
        params: SamplingParams,
        tools: list[dict[str, Any]] | None,
        template_kwargs: dict[str, Any] | None,
    ) -> Job:
        if params.reasoning_max_tokens == 0:
            template_kwargs = {**(template_kwargs or {}), "enable_thinking": False}
        prompt = self._protocol.prompt(messages, tools=tools, template_kwargs=template_kwargs)
        assert prompt.state is not None, "a rendered chat says where its answer begins"
        rules = AnswerRules(AnswerForm.of(params.structured_outputs), tools or ())
        grammar = self._grammars.for_answer(rules, prompt.text, prompt.state)
        return self._job(prompt.text, prompt.token_ids, params, chat=prompt, tools=tools, grammar=grammar)

    def _job(
        self,
        text: str | None,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        chat: RenderedPrompt | None = None,
        tools: list[dict[str, Any]] | None = None,
        grammar: CompiledGrammar | None = None,
    ) -> Job:
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._generation.eos_token_ids)
        hidden = frozenset() if params.include_stop_str_in_output else ends
        opens_response = grammar is None or not tools
        streams = [
            self._protocol.text_stream(params, prompt=chat, opens_response=opens_response) for _ in range(params.n)
        ]
        collectors = [Collector(stream, hidden) for stream in streams]
        state = chat.state if chat is not None else None
        return Job(f"offline-{next(self._ids)}", text, tuple(token_ids), params, state, tools, collectors, grammar)

    def _run(self, jobs: list[Job], *, show_progress: bool) -> list[RequestOutput]:
        requests = [request for job in jobs for request in self._requests(job)]
        with self._lock:
            try:
                for request in requests:
                    self._engine.add(request)
                self._step_until_done(jobs, show_progress=show_progress)
            finally:
                for request in requests:
                    self._engine.cancel(request.request_id)
        return [output_of(job, self.get_tokenizer()) for job in jobs]

    def _requests(self, job: Job) -> Iterable[Request]:
        bad = bad_word_sequences(self.get_tokenizer(), job.params.bad_words)
        for index, collector in enumerate(job.collectors):
            yield Request(
                request_id=f"{job.request_id}-{index}",
                prompt_token_ids=job.token_ids,
                params=job.params,
                sink=collector,
                bad_token_sequences=bad,
                choice_index=index,
                prompt_sink=collector.prompt.extend,
                grammar=job.grammar.start() if job.grammar else None,
            )

    def _step_until_done(self, jobs: list[Job], *, show_progress: bool) -> None:
        shown = show_progress and sys.stderr.isatty()
        with ProgressBar(jobs) if shown else nullcontext() as bar:
            while self._engine.has_work:
                self._engine.step()
                if bar is not None:
                    bar.update()


def _whole_numbers(token_ids: Any) -> list[int]:
    """The ids of a prompt, from a list or from an array of numpy or torch."""
    try:
        return [operator.index(token_id) for token_id in token_ids]
    except TypeError:
        raise InvalidRequestError(
            f"prompt_token_ids is {token_ids!r:.80}: it must be a list of whole numbers.", param="prompt_token_ids"
        ) from None
