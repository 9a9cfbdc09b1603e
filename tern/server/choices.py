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
from tern.server.generation import Generation
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

    Raises `InvalidRequestError` for more choices than the engine ever takes at once.
    """
    params = plan.params
    count, capacity = len(plan.prompts) * params.n, state.engine.capacity
    if capacity is not None and count > capacity:
        raise InvalidRequestError(
            f"The request asks for {count} choices ({len(plan.prompts)} prompts, n {params.n}), but this server takes "
            f"at most {capacity} at once: ask for fewer.",
            param="n" if params.n > 1 else "prompt",
        )
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
            observer=state.metrics.observe_choice(plan.arrived),
            stop_token_ids=stops,
            hidden_token_ids=ends if params.include_stop_str_in_output else ends | stops,
            single_call=plan.single_call,
        )
        requests.append(
            Request(
                request_id=f"{plan.request_id}-{index}",
                prompt_token_ids=plan.prompts[index // params.n],
                params=params,
                sink=sink,
                bad_token_sequences=tuple(plan.bad_words),
                priority=plan.priority,
                cache_salt=cache_salt(plan.owner),
                choice_index=index % params.n,
                grammar=plan.new_grammar(),
            )
        )
    return Generation(state.engine, mailbox, requests)


def cache_salt(owner: str | None) -> bytes:
    """What keeps the prefix-cache entries of one API key apart from all others; nothing where there are no keys."""
    return b"" if owner is None else hashlib.sha256(b"tern prefix cache\0" + owner.encode()).digest()
