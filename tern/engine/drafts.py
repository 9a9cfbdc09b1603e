"""Drafts: tokens that may come next, so that one step verifies several. Knows token ids and times; knows no tensors.

Two methods propose. `NgramIndex` copies what followed the last tokens before; the model's multi-token predictor, where
it has one, computes what follows (`tern.engine.predictor`) and its drafts are handed in through `learn`. Whatever is
proposed, the step that verifies it draws each token as it would have been drawn alone, so drafts change how fast an
answer comes and never what it says.

A draft costs a row of the step that verifies it and gives a token with some chance. Both are estimated as the engine
runs: the chance from the sequence's own recent drafts, verified or not, the cost from the times of past steps. A step
carries as many drafts, the likeliest first, as give the most tokens a second; where drafts lose, that is none.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from collections.abc import Sized
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from tern.engine.ngram import NgramIndex
from tern.engine.options import EngineOptions
from tern.engine.scheduler import Chunk
from tern.engine.sequence import Sequence
from tern.engine.step_times import StepTimes

NGRAM_DRAFTS = 8  # most drafts of one sequence in a step, unless the options say otherwise
PREDICTED_DRAFTS = 1  # the predictor is trained for the token after next; each further one costs another pass of it
LEAST_CHANCE = 0.25  # less likely drafts are not even tried; no machine computes a row for that little
_RECENT = 0.9  # weight of what is known when one more draft is seen
_GAIN_SMOOTHING = 0.05
_START_GAIN = 1.3  # about thirty steps of pure loss until the predictor is paused
PAUSE_STEPS = 1024


class Method(StrEnum):
    """Who proposes."""

    NGRAM = "ngram"
    MTP = "mtp"


class Acceptance:
    """How likely the next draft is right, from recent ones; without any, `prior` with the weight of two."""

    def __init__(self, prior: float = 0.5) -> None:
        self._right, self._seen = 2 * prior, 2.0

    @property
    def chance(self) -> float:
        """Between 0 and 1."""
        return self._right / self._seen

    def add(self, right: bool) -> None:
        """Count one draft whose predecessors were right."""
        self._right = self._right * _RECENT + right
        self._seen = self._seen * _RECENT + 1.0


@dataclass(frozen=True)
class Proposal:
    """Tokens proposed to follow a sequence of `length` tokens; each is right with `chance` if those before are."""

    method: Method
    length: int
    tokens: tuple[int, ...]
    chance: float

    @property
    def expected(self) -> float:
        """How many of the tokens will be right."""
        return sum(self.chance ** (place + 1) for place in range(len(self.tokens)))


@dataclass
class DraftState:
    """What drafting knows of one sequence. The predictor saw all of it if it began in the present `era`."""

    era: int | None
    index: NgramIndex | None
    acceptance: dict[Method, Acceptance]
    proposals: list[Proposal]


@dataclass(frozen=True)
class Speed:
    """What a step is expected to give and to take."""

    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class Outcome(Protocol):
    """What a step gave a sequence that samples: its tokens, and the predictor's drafts of what follows them."""

    @property
    def tokens(self) -> Sized: ...

    @property
    def accepted(self) -> int: ...

    @property
    def predicted(self) -> tuple[int, ...]: ...


class Drafter:
    """Chooses the drafts of every step. With both methods switched off it proposes nothing.

    `predicts`: the model has a multi-token predictor. What is proposed by which method is for `options` to say.
    """

    def __init__(self, options: EngineOptions, *, predicts: bool) -> None:
        count, method = options.num_speculative_tokens, options.speculation
        self.ngram_drafts = (count or NGRAM_DRAFTS) if method in ("auto", "ngram") else 0
        self.predicted_drafts = 0
        if predicts and method in ("auto", "mtp"):
            self.predicted_drafts = count if count and method == "mtp" else PREDICTED_DRAFTS
        self.times = StepTimes()
        self.drafted_tokens = self.accepted_tokens = 0
        self._lookup = (options.prompt_lookup_min, options.prompt_lookup_max)
        self._common = {method: Acceptance() for method in Method}
        self._gain = _START_GAIN  # tokens a second with the predictor, over those without
        self._predictor_seconds = 0.0
        self._pause = 0  # decode steps until it works again
        self._era = 0  # counts its pauses

    @property
    def max_drafts(self) -> int:
        """Most drafts of a sequence in a step."""
        return max(self.ngram_drafts, self.predicted_drafts)

    def follows(self, sequence: Sequence) -> bool:
        """Whether the predictor shall see the sequence's next step, and draft what follows it.

        It needs every position of a sequence, so one that has lived through a pause is not followed any more.
        """
        if not self.predicted_drafts or not self._speculates(sequence):
            return False
        return self._state(sequence).era == self._era and not self._pause  # the state notes when it began

    def draft(self, sequences: Ordered[Sequence], room: int) -> list[tuple[int, ...]]:
        """Drafts for each of the `sequences`, which all decode, at most `room` together: those that pay."""
        if not (self.ngram_drafts or self.predicted_drafts):
            return [()] * len(sequences)
        proposals = [self._proposal(sequence) for sequence in sequences]
        if not self.times.known(len(sequences)):
            return [()] * len(sequences)
        counts, speed = self._best(proposals, room)
        if any(map(self.follows, sequences)):
            without = [found if found and found.method is Method.NGRAM else None for found in proposals]
            self._weigh_predictor(speed, self._best(without, room)[1])
        return [found.tokens[:count] if found else () for found, count in zip(proposals, counts, strict=True)]

    def learn(
        self, chunks: Ordered[Chunk], outcomes: Ordered[Outcome], seconds: float, predictor_seconds: float
    ) -> None:
        """Note how a step went, before its tokens are appended; `outcomes` has one for each chunk that samples."""
        if all(chunk.is_decode for chunk in chunks):
            self.times.add(len(chunks), sum(1 + len(chunk.drafts) for chunk in chunks), seconds)
            self._pause = max(0, self._pause - 1)
            if predictor_seconds:
                before = self._predictor_seconds or predictor_seconds
                self._predictor_seconds = _RECENT * before + (1.0 - _RECENT) * predictor_seconds
        sampling = [chunk for chunk in chunks if chunk.samples]
        for chunk, outcome in zip(sampling, outcomes, strict=True):
            self.drafted_tokens += len(chunk.drafts)
            self.accepted_tokens += outcome.accepted
            if outcome.predicted:
                self._propose(chunk.sequence, Method.MTP, len(outcome.tokens), outcome.predicted)

    def _speculates(self, sequence: Sequence) -> bool:
        return not sequence.sampling.penalised  # penalties count the tokens so far, which drafts would be among

    def _state(self, sequence: Sequence) -> DraftState:
        if sequence.drafting is None:
            index = NgramIndex(*self._lookup) if self.ngram_drafts else None
            acceptance = {method: Acceptance(common.chance) for method, common in self._common.items()}
            sequence.drafting = DraftState(None if self._pause else self._era, index, acceptance, [])
        return sequence.drafting

    def _proposal(self, sequence: Sequence) -> Proposal | None:
        """The proposal for what follows the sequence of which the most is expected, no longer than it may grow."""
        room = sequence.num_draftable_tokens
        if room < 1 or not self._speculates(sequence):
            return None
        state = self._state(sequence)
        self._review(sequence, state)
        if state.index is not None:
            copied = state.index.continuation(sequence.token_ids, min(self.ngram_drafts, room))
            self._propose(sequence, Method.NGRAM, 0, copied)
        here = (proposal for proposal in state.proposals if proposal.length == len(sequence.token_ids))
        best = max(here, key=lambda proposal: proposal.expected, default=None)
        return best and Proposal(best.method, best.length, best.tokens[:room], best.chance)

    def _propose(self, sequence: Sequence, method: Method, ahead: int, tokens: tuple[int, ...]) -> None:
        state = self._state(sequence)
        self._review(sequence, state)
        if tokens:
            chance = state.acceptance[method].chance
            state.proposals.append(Proposal(method, len(sequence.token_ids) + ahead, tokens, chance))

    def _review(self, sequence: Sequence, state: DraftState) -> None:
        """Compare what was proposed with what came, verified or not; keep what may still come."""
        tokens = sequence.token_ids
        for proposal in state.proposals:
            came = tokens[proposal.length : proposal.length + len(proposal.tokens)]
            for drafted, actual in zip(proposal.tokens, came, strict=False):
                for acceptance in (state.acceptance[proposal.method], self._common[proposal.method]):
                    acceptance.add(drafted == actual)
                if drafted != actual:
                    break
        state.proposals = [proposal for proposal in state.proposals if proposal.length >= len(tokens)]

    def _best(self, proposals: Ordered[Proposal | None], room: int) -> tuple[list[int], Speed]:
        """How many drafts of each proposal give the most tokens a second, and what such a step does."""
        candidates = sorted(
            (-(found.chance ** (place + 1)), place, row)
            for row, found in enumerate(proposals)
            if found is not None
            for place in range(len(found.tokens))
            if found.chance ** (place + 1) >= LEAST_CHANCE
        )
        plain = len(proposals)
        seconds = self.times.curve(plain)
        speeds = [Speed(float(plain), seconds(plain))]
        for taken, (chance, _, _) in enumerate(candidates[:room], start=1):
            speeds.append(Speed(speeds[-1].tokens - chance, seconds(plain + taken)))
        best = max(range(len(speeds)), key=lambda taken: speeds[taken].rate)  # of equals the one with fewest drafts
        counts = [0] * plain
        for _, _, row in candidates[:best]:
            counts[row] += 1
        return counts, speeds[best]

    def _weigh_predictor(self, speed: Speed, without: Speed) -> None:
        """Pause the predictor when it has cost more than it gave for a while."""
        gain = speed.tokens / (speed.seconds + self._predictor_seconds) / without.rate
        self._gain += _GAIN_SMOOTHING * (gain - self._gain)
        if self._gain < 1.0:
            self._gain, self._pause = _START_GAIN, PAUSE_STEPS
            self._era += 1
