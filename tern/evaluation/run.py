"""One run of the lm-evaluation-harness over a model: finding the tasks, asking them, naming what was wrong.

Knows the harness's task manager and its `evaluate`. The harness is imported late: only `tern eval` needs it.
"""

from __future__ import annotations

import difflib
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tern.engine import SamplingParams
from tern.errors import OptionError, TernError
from tern.evaluation.report import EvaluationReport, read_scores
from tern.llm import LLM

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

SEED = 1234
"""Of the choice of few-shot examples; the harness's own."""


@dataclass(frozen=True)
class EvaluationPlan:
    """What is asked.

    `tasks` are the harness's names (tasks, groups, tags) or `.yaml` files; `tasks_directory` holds further ones.
    `limit` questions of each task, all without. With `chat` every question is a conversation that begins with `system`,
    answered after a thought if `thinking`. `generation` overrides the tasks' sampling (`temperature`, `top_p`, `seed`).
    """

    tasks: Sequence[str]
    chat: bool = False
    thinking: bool = True
    limit: int | None = None
    num_fewshot: int | None = None
    max_tokens: int | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    tasks_directory: Path | None = None


class Evaluation:
    """A plan with its tasks and their questions at hand, before any model is.

    Raises `OptionError` if the harness is not installed, a task is not known or its questions cannot be had, and
    `InvalidRequestError` for sampling that no request could ask for.
    """

    def __init__(self, plan: EvaluationPlan) -> None:
        self._plan = plan
        SamplingParams(**plan.generation)  # raises now rather than after the model is loaded
        manager = _task_manager(plan.tasks_directory)
        self._loaded = _load([_found(task, manager) for task in plan.tasks], manager)
        for task in self._loaded["tasks"].values():
            self._set_up(task)

    def run(self, llm: LLM, name: str) -> EvaluationReport:
        """Ask `llm`, called `name` in the report, every question. Raises `OptionError` where the harness refuses."""
        from lm_eval.evaluator import evaluate

        from tern.evaluation.harness_model import HarnessModel

        plan = self._plan
        model = HarnessModel(llm, name, chat=plan.chat, thinking=plan.thinking, max_tokens=plan.max_tokens)
        random.seed(SEED)
        started = time.perf_counter()
        try:
            results = evaluate(
                model,
                self._loaded,
                limit=plan.limit,
                system_instruction=plan.system,
                apply_chat_template=plan.chat,
                fewshot_as_multiturn=plan.chat,
            )
        except TernError:
            raise
        except (ValueError, KeyError, RuntimeError) as error:
            raise OptionError(f"The evaluation of {', '.join(plan.tasks)} failed: {_line(error)}") from error
        return EvaluationReport(name, read_scores(results), time.perf_counter() - started, results["samples"])

    def _set_up(self, task: Any) -> None:
        generation: dict[str, Any] = dict(self._plan.generation)
        if generation and task.get_config("output_type") == "generate_until":
            generation["do_sample"] = generation.get("temperature", 1.0) > 0
            task.set_config(key="generation_kwargs", value=generation, update=True)
        if self._plan.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=self._plan.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)


def _task_manager(directory: Path | None) -> TaskManager:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise OptionError(
            f"An evaluation needs the lm-evaluation-harness ({error.name} is missing): pip install 'tern-llm[eval]'."
        ) from None
    if directory is not None and not directory.is_dir():
        raise OptionError(f"--tasks-dir is {directory}: there is no such directory.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=directory)


def _found(task: str, manager: TaskManager) -> str:
    if task in manager.task_index or (task.endswith(".yaml") and Path(task).is_file()):
        return task
    near = difflib.get_close_matches(task, manager.all_tasks, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise OptionError(
        f"--tasks names {task}: it is no task of the lm-evaluation-harness, not in --tasks-dir and no .yaml file."
        f"{hint} --list-tasks prints those there are."
    )


def _load(tasks: Sequence[str], manager: TaskManager) -> Any:
    try:
        return manager.load(list(tasks))
    except Exception as error:  # whatever a data set's format, server or own code may raise
        raise OptionError(
            f"The questions of {', '.join(tasks)} cannot be loaded ({_line(error)}). Most are downloaded from the hub "
            "once and kept: check the connection (HF_ENDPOINT, HF_HOME and HF_TOKEN count), or the task's file."
        ) from error


def task_names(directory: Path | None = None) -> list[str]:
    """All tasks, groups and tags there are, those in `directory` included. Raises as `Evaluation`."""
    return list(_task_manager(directory).all_tasks)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
