"""What a server did with the requests it was sent, in figures. Knows moments and counts; sends nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from tern.bench.setting import Setting


@dataclass
class RequestRecord:
    """One request, moments in seconds on one clock: when it was `sent`, when each piece of text came, when it `ended`.

    `prompt_tokens` and `output_tokens` as the server counted them. `failure` says why there is no whole answer.
    """

    sent: float
    pieces: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    failure: str | None = None


@dataclass(frozen=True)
class Spread:
    """Three percentiles of some seconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread | None:
        """Between neighbours, percentiles lie on a straight line; None of nothing."""
        if not seconds:
            return None
        ordered = sorted(seconds)
        return cls(*(_percentile(ordered, share) for share in (0.5, 0.9, 0.99)))


@dataclass(frozen=True)
class RateResult:
    """One rate of arrivals: `rate` in requests a second, None for all at once.

    Of the `sent` requests, `answered` ended whole, `failed` did not, with these `failures` and how many had each; the
    rest was under way when the run was interrupted. Everything else counts answered requests only, within `seconds`
    from the first request to the last ending: `requests_per_s` is thus the goodput. Mean `prompt_tokens` and
    `output_tokens` are the server's counts. `first_token`: from sending a request to its first text; `inter_token`:
    between two pieces of text, of all answers together (a server that sends several tokens as one piece has fewer,
    longer ones); `per_token`: each answer's mean time for a token after its first; `end_to_end`: from sending a
    request to its end.
    """

    rate: float | None
    sent: int
    answered: int
    failed: int
    failures: dict[str, int]
    seconds: float
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens: float
    output_tokens: float
    first_token: Spread | None
    inter_token: Spread | None
    per_token: Spread | None
    end_to_end: Spread | None

    @property
    def label(self) -> str:
        """The rate as the user types it."""
        return "inf" if self.rate is None else f"{self.rate:g}"


@dataclass(frozen=True)
class LoadReport:
    """What `tern bench --url --json` prints; `setting` is the client's machine.

    `ignores_eos`: the server was asked, and agreed, to let every answer reach `output_tokens`. `interrupted`: the last
    rate was not finished, and later ones were not begun.
    """

    url: str
    model: str
    endpoint: str
    setting: Setting
    requests: int
    prompt_tokens: int
    output_tokens: int
    concurrency: int | None
    seed: int
    ignores_eos: bool
    interrupted: bool
    results: list[RateResult]

    def as_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def summarise(rate: float | None, records: Sequence[RequestRecord], sent: int) -> RateResult:
    """The figures of one rate, from the records of its requests that ended, out of `sent`."""
    answered = [record for record in records if record.failure is None]
    failures = Counter(record.failure for record in records if record.failure is not None)
    begun = min((record.sent for record in records), default=0.0)
    seconds = max((record.ended for record in records), default=0.0) - begun
    output = sum(record.output_tokens for record in answered)
    gaps = [later - earlier for record in answered for earlier, later in pairwise(record.pieces)]
    paces = [
        (record.pieces[-1] - record.pieces[0]) / (record.output_tokens - 1)
        for record in answered
        if record.output_tokens > 1
    ]
    return RateResult(
        rate=rate,
        sent=sent,
        answered=len(answered),
        failed=len(records) - len(answered),
        failures=dict(failures.most_common()),
        seconds=seconds,
        requests_per_s=len(answered) / seconds if seconds else 0.0,
        output_tokens_per_s=output / seconds if seconds else 0.0,
        prompt_tokens=sum(record.prompt_tokens for record in answered) / max(1, len(answered)),
        output_tokens=output / max(1, len(answered)),
        first_token=Spread.of([record.pieces[0] - record.sent for record in answered]),
        inter_token=Spread.of(gaps),
        per_token=Spread.of(paces),
        end_to_end=Spread.of([record.ended - record.sent for record in answered]),
    )


def _percentile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
