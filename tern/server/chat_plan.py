"""From a chat request to what the engine shall generate: sampling values, the thought's limits, the rendered prompt.

Every door that chats comes through here with a `ChatRequest`; knows no form of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tern.chat import (
    AnswerRules,
    CompiledGrammar,
    HeldResponseParser,
    ParserState,
    RenderedPrompt,
    ResponseParser,
    bad_word_sequences,
    validate_tools,
)
from tern.engine import SamplingParams
from tern.errors import InvalidRequestError
from tern.server.choices import Plan
from tern.server.schemas.chat import ChatRequest
from tern.server.state import AppState

EFFORT_TOKENS = {"none": 0, "low": 1024, "medium": 8192, "high": None}
"""The longest thought, in tokens, for each `reasoning_effort`; None is as long as it takes."""


@dataclass(frozen=True)
class Asked:
    """A request that was read and found good, its prompt rendered."""

    request: ChatRequest
    params: SamplingParams
    prompt: RenderedPrompt
    parser_state: ParserState
    bad_words: Sequence[tuple[int, ...]]
    rules: AnswerRules
    grammar: CompiledGrammar | None

    @property
    def parser(self) -> ResponseParser | HeldResponseParser:
        """A parser for one answer."""
        held = self.rules.form is not None and not self.rules.must_call
        return (HeldResponseParser if held else ResponseParser)(self.request.offered_tools, start=self.parser_state)


def read_chat(state: AppState, request: ChatRequest) -> Asked:
    """Check a request and render it. Raises what is wrong with it."""
    request.check()
    state.check_model(request.model)
    params = _sampling(state, request)
    rules = request.answer_rules
    prompt = _render(state, request)
    assert prompt.state is not None, "a rendered chat says where its answer begins"
    bad_words = bad_word_sequences(state.protocol.tokenizer, params.bad_words)
    grammar = state.grammars.for_answer(rules, prompt.text, prompt.state)
    return Asked(request, params, prompt, prompt.state, bad_words, rules, grammar)


def _sampling(state: AppState, request: ChatRequest) -> SamplingParams:
    try:
        return request.sampling_params(
            state.model.generation.sampling_defaults(),
            max_tokens=request.token_limit,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            reasoning_max_tokens=_thought_limit(request),
        )
    except InvalidRequestError as error:
        raise request.named(error) from None


def _thought_limit(request: ChatRequest) -> int | None:
    """The stricter of the limit in tokens and the limit that the effort implies."""
    effort = EFFORT_TOKENS.get(request.reasoning_effort or "high")
    limits = [limit for limit in (request.thinking_limit, effort) if limit is not None]
    return min(limits, default=None)


def _render(state: AppState, request: ChatRequest) -> RenderedPrompt:
    validate_tools(request.tools)  # also where tool_choice keeps them from the model
    kwargs: dict[str, Any] = dict(request.chat_template_kwargs or {})
    if _thought_limit(request) == 0:
        kwargs["enable_thinking"] = False
    return state.protocol.prompt(request.messages, tools=request.offered_tools, template_kwargs=kwargs)


def plan_chat(state: AppState, asked: Asked, *, request_id: str, owner: str | None, arrived: float) -> Plan:
    """What the engine shall generate for it; `owner` and `arrived` as in `Plan`."""
    request = asked.request
    return Plan(
        request_id=request_id,
        prompts=[tuple(asked.prompt.token_ids)],
        params=asked.params,
        bad_words=asked.bad_words,
        new_stream=lambda: state.protocol.text_stream(
            asked.params,
            prompt=asked.prompt,
            opens_response=asked.grammar is None or asked.rules.only_content,
        ),
        new_parser=lambda: asked.parser,
        new_grammar=lambda: asked.grammar.start() if asked.grammar else None,
        arrived=arrived,
        owner=owner,
        priority=request.priority,
        single_call=not request.parallel_tool_calls,
    )
