"""From prompts and parameters to a generation: one engine request and one sink for each choice.

Knows how the families of routes are alike: several prompts, `n` choices of each, all behind one mailbox.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tern.chat import TextStream
from tern.engine import Request, SamplingParams, TokenGrammar
from tern.errors import InvalidRequestError
from tern.server.generation import Generation, TimeLimit
from tern.server.prompt_log import log_request
from tern.server.request_record import current_record
from tern.server.sink import ChoiceSink, EventParser, Mailbox
from tern.server.state import AppState


@dataclass(frozen=True)
class Plan:
    """What a request wants generated: `params.n` choices for each prompt, in order.

    `bad_words` are those of `params` as tokens. `new_stream`, `new_parser` and `new_grammar` make what
    one choice has for itself.
    `owner` is the API key that the request came with: what different owners leave in the prefix cache is kept apart.
    `priority`: lower goes first. `arrived`: when the request did, by `time.monotonic()`.
    """

    request_id: str
    prompts: Sequence[tuple[int, ...]]
    params: SamplingParams
    bad_words: Sequence[tuple[int, ...]]
    new_stream: Callable[[], TextStream]
    new_parser: Callable[[], EventParser]
    arrived: float
    owner: str | None = None
    priority: int = 0
    single_call: bool = False
    new_grammar: Callable[[], TokenGrammar | None] = lambda: None


def start(state: AppState, plan: Plan) -> Generation:
    """A generation for the plan, not submitted yet. Call it on the event loop that will read the updates.

    Raises `InvalidRequestError` for more choices, or more prompt tokens, than the engine ever takes at once.
    """
    params = plan.params
    count, capacity = len(plan.prompts) * params.n, state.engine.capacity
    if capacity is not None and count > capacity:
        raise InvalidRequestError(
            f"The request asks for {count} choices ({len(plan.prompts)} prompts, n {params.n}), but this server takes "
            f"at most {capacity} at once: ask for fewer.",
            param="n" if params.n > 1 else "prompt",
        )
    tokens, most = sum(map(len, plan.prompts)), state.engine.token_capacity
    if most is not None and tokens > most and len(plan.prompts) > 1:
        raise InvalidRequestError(
            f"The request has {len(plan.prompts)} prompts of {tokens} tokens in all, but at most {most} may wait here: "
            "send them in several requests.",
            param="prompt",
        )
    record = current_record()
    engine_id = plan.request_id
    if record is not None:
        record.answer_id, record.params = plan.request_id, params
        record.prompt_tokens = tokens
        engine_id = f"{record.request_id}:{plan.request_id}"  # what a client chose alone need not be unique
    state.metrics.asked(params.n, params.max_tokens)
    if state.options.log_requests:
        log_request(plan.prompts, params, state.protocol.tokenizer, state.options.max_log_len or 0)
    mailbox = Mailbox()
    stops = frozenset(params.stop_token_ids)
    ends = frozenset() if params.ignore_eos else state.model.generation.eos_token_ids
    requests = []
    for index in range(count):
        sink = ChoiceSink(
            index=index,
            stream=plan.new_stream(),
            parser=plan.new_parser(),
            deliver=mailbox.post,
            observer=state.metrics.observe_choice(plan.arrived, record),
            stop_token_ids=stops,
            hidden_token_ids=ends if params.include_stop_str_in_output else ends | stops,
            single_call=plan.single_call,
        )
        requests.append(
            Request(
                request_id=f"{engine_id}-{index}",
                prompt_token_ids=plan.prompts[index // params.n],
                params=params,
                sink=sink,
                bad_token_sequences=tuple(plan.bad_words),
                priority=plan.priority,
                cache_salt=cache_salt(plan.owner),
                choice_index=index % params.n,
                prompt_sink=sink.score,
                grammar=plan.new_grammar(),
            )
        )
    seconds = state.options.request_timeout
    limit = None if seconds is None else TimeLimit(seconds, plan.arrived)
    return Generation(state.engine, mailbox, requests, limit)


def cache_salt(owner: str | None) -> bytes:
    """What keeps the prefix-cache entries of one API key apart from all others; nothing where there are no keys."""
    return b"" if owner is None else hashlib.sha256(b"tern prefix cache\0" + owner.encode()).digest()
