"""From the rules of an answer to what holds it token by token: compiled once, kept for the next request alike.

Knows llguidance, its limits and a cache. Knows nothing of tensors: the engine gets an object that fills bit masks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import cached_property

from llguidance import LLMatcher, LLParserLimits

from tern.chat.grammar_matcher import AnswerGrammar, GrammarError
from tern.chat.grammar_rules import AnswerForm, AnswerRules, GrammarText, answer_grammar, text_grammar
from tern.chat.grammar_schema import explain
from tern.chat.grammar_vocabulary import GrammarVocabulary
from tern.chat.parser import ParserState
from tern.chat.tokenizer import Tokenizer
from tern.errors import InvalidRequestError

_log = logging.getLogger(__name__)

KEPT_GRAMMARS = 64
COMPILE_SECONDS = 10.0
_WORKERS = 2
_LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=100_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
"""Deterministic bounds, on compiling and on each mask."""


class CompiledGrammar:
    """A grammar that is ready for use; every answer gets a state of its own by `start`. Thread-safe."""

    def __init__(self, vocabulary: GrammarVocabulary, matcher: LLMatcher, *, thinking: bool) -> None:
        self._vocabulary = vocabulary
        self._matcher = matcher
        self._thinking = thinking
        self._lock = threading.Lock()

    def start(self) -> AnswerGrammar:
        """What holds one answer."""
        with self._lock:
            matcher = self._matcher.deep_copy()
        return AnswerGrammar(self._vocabulary, matcher, thinking=self._thinking)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, whose answers end with one of `end_ids`. Thread-safe.

    Call it off any event loop: the first call looks at the whole vocabulary, and a grammar may take a second.
    `num_compiled` and `compile_seconds` count what was not found among the kept ones.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: Iterable[int], *, seconds: float = COMPILE_SECONDS) -> None:
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Future[LLMatcher | str]] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None
        self.num_compiled = 0
        self.compile_seconds = 0.0

    def for_answer(self, rules: AnswerRules, prompt: str, state: ParserState) -> CompiledGrammar | None:
        """The grammar of a chat's answer to a rendered `prompt` that leaves off in `state`; None if nothing binds.

        Raises `InvalidRequestError` that names the field at fault: no answer is ever left unbound instead.
        """
        if not rules.binds:
            return None
        newlines = len(prompt) - len(prompt.rstrip("\n")) if state is ParserState.BETWEEN else 0
        thinking = state is ParserState.REASONING
        return self._compiled(answer_grammar(rules, state, newlines), thinking=thinking)

    def for_text(self, form: AnswerForm | None) -> CompiledGrammar | None:
        """The grammar of a plain completion; None without a form. Raises as `for_answer`."""
        return None if form is None else self._compiled(text_grammar(form), thinking=False)

    @cached_property
    def _vocabulary(self) -> GrammarVocabulary:
        return GrammarVocabulary(self._tokenizer, self._end_ids)

    def _compiled(self, grammar: GrammarText, *, thinking: bool) -> CompiledGrammar:
        try:
            result = self._future(grammar.text).result(self._seconds)
        except FutureTimeoutError:
            raise InvalidRequestError(
                f"{grammar.place} takes more than {self._seconds:g} seconds to become a grammar: simplify it.",
                param=grammar.place,
            ) from None
        if isinstance(result, str):
            raise self._explained(grammar, result)
        return CompiledGrammar(self._vocabulary, result, thinking=thinking)

    def _future(self, text: str) -> Future[LLMatcher | str]:
        """The grammar, under way or done; of more than are kept the one longest unused goes."""
        with self._lock:
            future = self._kept.get(text)
            if future is None:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="tern-grammar")
                future = self._kept[text] = self._pool.submit(self._compile, text)
            self._kept.move_to_end(text)
            while len(self._kept) > KEPT_GRAMMARS:
                self._kept.popitem(last=False)
        return future

    def _compile(self, text: str) -> LLMatcher | str:
        """The matcher at the grammar's beginning, or what is wrong with the grammar."""
        with self._lock:
            vocabulary = self._vocabulary
        started = time.perf_counter()
        matcher = LLMatcher(vocabulary.library, text, log_level=0, limits=_LIMITS)
        fault = str(matcher.get_error())
        if not fault:
            fault = _first_mask_fault(vocabulary, matcher)
        with self._lock:
            self.num_compiled += 1
            self.compile_seconds += time.perf_counter() - started
        return fault or matcher

    def _explained(self, grammar: GrammarText, fault: str) -> InvalidRequestError:
        for part in grammar.parts:
            found = explain(part.schema, part.place, self._fault_of_rule)
            if found is not None:
                return found
        place = grammar.parts[0].place if len(grammar.parts) == 1 else grammar.place
        reason = " ".join(fault.split("\n")[0].split())
        return InvalidRequestError(f"{place} makes no usable grammar ({reason:.200}): change it.", param=place)

    def _fault_of_rule(self, rule: str) -> str | None:
        matcher = LLMatcher(self._vocabulary.library, f"start: {rule}", log_level=0, limits=_LIMITS)
        return str(matcher.get_error()) or None


def _first_mask_fault(vocabulary: GrammarVocabulary, matcher: LLMatcher) -> str:
    """What keeps an answer from beginning at all, "" if nothing does; many limits are only met by a mask."""
    first = AnswerGrammar(vocabulary, matcher.deep_copy(), thinking=False)
    try:
        first.fill(vocabulary.end_mask.copy(), ())
    except GrammarError as error:
        return str(error)
    return ""
