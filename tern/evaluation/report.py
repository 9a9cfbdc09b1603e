"""What an evaluation found, apart from how the harness writes it. Knows the harness's result keys and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, or of a group of tasks, over `samples` questions.

    `filter` names how the answer was taken out of the text ("none": the text itself); `stderr` is None where the
    harness has none for the metric.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    samples: int | None
    num_fewshot: int | None


@dataclass(frozen=True)
class EvaluationReport:
    """All scores of a run, its seconds, and by task each question with its answers, as the harness logs them."""

    model: str
    scores: list[TaskScore]
    seconds: float
    samples: Mapping[str, list[dict[str, Any]]]

    def as_json(self) -> dict[str, Any]:
        """The scores, without the questions and answers."""
        return {
            "model": self.model,
            "scores": [asdict(score) for score in self.scores],
            "seconds": round(self.seconds, 1),
        }


def read_scores(results: Mapping[str, Any]) -> list[TaskScore]:
    """The scores in what the harness's `simple_evaluate` returns, in its order: groups before their tasks."""
    return [score for task in results["results"] for score in _scores_of(task, results)]


def _scores_of(task: str, results: Mapping[str, Any]) -> Iterator[TaskScore]:
    found: Mapping[str, Any] = results["results"][task]
    counts = results.get("n-samples", {}).get(task)
    for key, value in found.items():
        metric, separator, chosen = key.partition(",")
        if not separator or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = found.get(f"{metric}_stderr,{chosen}")
        yield TaskScore(
            task=task,
            metric=metric,
            filter=chosen,
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, int | float) else None,
            samples=counts["effective"] if counts else None,
            num_fewshot=results.get("n-shot", {}).get(task),
        )
