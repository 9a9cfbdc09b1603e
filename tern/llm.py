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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tern.chat import (
    AnswerForm,
    AnswerRules,
    ChatProtocol,
    CompiledGrammar,
    GrammarCompiler,
    ParsedMessage,
    ParserState,
    RenderedPrompt,
    TextStream,
    Tokenizer,
    bad_word_sequences,
    parse_held_response,
    parse_response,
)
from tern.checkpoint import resolve_model
from tern.engine import (
    CONTINUE,
    Engine,
    EngineOptions,
    Finish,
    FinishReason,
    GeneratedToken,
    Request,
    SamplingParams,
    ScoredToken,
    Steering,
    TokenLogprob,
)
from tern.errors import InvalidRequestError, OptionError

if TYPE_CHECKING:
    import torch

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


@dataclass(frozen=True)
class Logprob:
    """One candidate of one step: natural log-probability, rank among the vocabulary (1 = likeliest), its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass
class CompletionOutput:
    """One generated sequence.

    `token_ids` includes the end token that stopped it; `text` does not. `logprobs[i]` maps candidate ids of token i to
    their `Logprob`, token i itself first. `finish_reason` is "stop", "length", "cancelled" or "error"; `stop_reason` is
    the stop string or the stop token id where one of those ended it. `message` is the parsed answer of a chat, None for
    plain prompts.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    error: str | None = None
    message: ParsedMessage | None = None


@dataclass
class RequestOutput:
    """All outputs of one prompt. `num_cached_tokens` of its prompt came from the prefix cache.

    `prompt_logprobs[i]`, if they were asked for, maps candidate ids of prompt token i to their `Logprob`, the token
    itself first; the first prompt token has None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass
class _Collector:
    """The sink of one sequence: keeps its tokens and lets the text stream decide about stops and steering.

    The text of `hidden_token_ids`, mostly the tokens that end the sequence, is no part of the output.
    """

    stream: TextStream
    hidden_token_ids: frozenset[int]
    tokens: list[GeneratedToken] = field(default_factory=list)
    prompt: list[ScoredToken] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finished: Finish | None = None

    def push(self, token: GeneratedToken) -> Steering:
        self.tokens.append(token)
        if token.token_id in self.hidden_token_ids and not token.forced:
            return CONTINUE
        step = self.stream.push(token.token_id)
        self.pieces.append(step.text)
        return Steering(stop=step.stop, force=step.force)

    def finish(self, finish: Finish) -> None:
        self.pieces.append(self.stream.finish())
        self.finished = finish


@dataclass
class _Job:
    """One prompt on its way through the engine, with a collector for each of its `n` choices.

    `state` is where in a response the prompt of a chat ends, None for a plain prompt.
    """

    request_id: str
    text: str | None
    token_ids: tuple[int, ...]
    params: SamplingParams
    state: ParserState | None
    tools: list[dict[str, Any]] | None
    collectors: list[_Collector]
    grammar: CompiledGrammar | None = None


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

    def _completion_job(self, prompt: Prompt, params: SamplingParams) -> _Job:
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
    ) -> _Job:
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
    ) -> _Job:
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._generation.eos_token_ids)
        hidden = frozenset() if params.include_stop_str_in_output else ends
        opens_response = grammar is None or not tools
        streams = [
            self._protocol.text_stream(params, prompt=chat, opens_response=opens_response) for _ in range(params.n)
        ]
        collectors = [_Collector(stream, hidden) for stream in streams]
        state = chat.state if chat is not None else None
        return _Job(f"offline-{next(self._ids)}", text, tuple(token_ids), params, state, tools, collectors, grammar)

    def _run(self, jobs: list[_Job], *, show_progress: bool) -> list[RequestOutput]:
        requests = [request for job in jobs for request in self._requests(job)]
        with self._lock:
            try:
                for request in requests:
                    self._engine.add(request)
                self._step_until_done(jobs, show_progress=show_progress)
            finally:
                for request in requests:
                    self._engine.cancel(request.request_id)
        return [self._output(job) for job in jobs]

    def _requests(self, job: _Job) -> Iterable[Request]:
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

    def _step_until_done(self, jobs: list[_Job], *, show_progress: bool) -> None:
        shown = show_progress and sys.stderr.isatty()
        with _ProgressBar(jobs) if shown else nullcontext() as bar:
            while self._engine.has_work:
                self._engine.step()
                if bar is not None:
                    bar.update()

    def _output(self, job: _Job) -> RequestOutput:
        outputs = [self._completion(index, collector, job) for index, collector in enumerate(job.collectors)]
        cached = max((c.finished.num_cached_tokens for c in job.collectors if c.finished), default=0)
        scores: list[dict[int, Logprob] | None] | None = None
        if job.params.prompt_logprobs is not None:
            scores = [None, *map(self._logprobs, job.collectors[0].prompt)]
        return RequestOutput(
            job.request_id,
            job.text,
            list(job.token_ids),
            outputs,
            num_cached_tokens=cached,
            prompt_logprobs=scores,
        )

    def _completion(self, index: int, collector: _Collector, job: _Job) -> CompletionOutput:
        finish = collector.finished
        assert finish is not None, "the engine went idle without finishing a request"
        text = "".join(collector.pieces)
        parse = parse_response if job.params.structured_outputs is None else parse_held_response
        wants_logprobs = job.params.logprobs is not None
        chosen = [token.logprob.logprob if token.logprob else 0.0 for token in collector.tokens]
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=[token.token_id for token in collector.tokens],
            cumulative_logprob=sum(chosen) if wants_logprobs else None,
            logprobs=[self._logprobs(token) for token in collector.tokens] if wants_logprobs else None,
            finish_reason=str(finish.reason),
            stop_reason=collector.stream.stop_string or self._stop_token(finish, job.params),
            error=finish.message if finish.reason is FinishReason.ERROR else None,
            message=parse(text, tools=job.tools, start=job.state) if job.state else None,
        )

    def _stop_token(self, finish: Finish, params: SamplingParams) -> int | None:
        return finish.stop_token_id if finish.stop_token_id in params.stop_token_ids else None

    def _logprobs(self, token: ScoredToken) -> dict[int, Logprob]:
        candidates = [token.logprob or TokenLogprob(token.token_id, 0.0, 1), *token.top_logprobs]
        decode = self.get_tokenizer().token_text
        return {each.token_id: Logprob(each.logprob, each.rank, decode(each.token_id)) for each in candidates}


def _whole_numbers(token_ids: Any) -> list[int]:
    """The ids of a prompt, from a list or from an array of numpy or torch."""
    try:
        return [operator.index(token_id) for token_id in token_ids]
    except TypeError:
        raise InvalidRequestError(
            f"prompt_token_ids is {token_ids!r:.80}: it must be a list of whole numbers.", param="prompt_token_ids"
        ) from None


class _ProgressBar:
    """Finished prompts and generated tokens on a terminal's standard error."""

    def __init__(self, jobs: list[_Job]) -> None:
        self._collectors = [collector for job in jobs for collector in job.collectors]
        self._progress = Progress(
            TextColumn("Generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[tokens]} tokens"),
            console=Console(stderr=True),
        )
        self._task: TaskID = self._progress.add_task("generate", total=len(self._collectors), tokens=0)

    def __enter__(self) -> _ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self) -> None:
        """Show how far the sequences are."""
        done = sum(collector.finished is not None for collector in self._collectors)
        tokens = sum(len(collector.tokens) for collector in self._collectors)
        self._progress.update(self._task, completed=done, tokens=tokens)
