"""`tern eval`: scores of a model on the tasks of the lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tern.errors import OptionError

if TYPE_CHECKING:
    from tern.evaluation import EvaluationReport


def evaluate(
    tasks: Annotated[str, typer.Option(help="Task names with commas between, or .yaml files of tasks.")] = "",
    model: Annotated[str | None, typer.Option(help="Directory, .gguf file, hub id or dummy:PRESET.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in conversations; the thought is no answer.")] = False,
    thinking: Annotated[bool, typer.Option(help="With --chat: think before answering.")] = True,
    system: Annotated[str | None, typer.Option(help="With --chat: system message.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task; default: all.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Solved examples before each question.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, thought included.")] = None,
    temperature: Annotated[float | None, typer.Option(help="In place of the tasks' own; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="In place of the tasks' own.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    tasks_dir: Annotated[Path | None, typer.Option(help="Directory of further tasks.")] = None,
    list_tasks: Annotated[bool, typer.Option("--list-tasks", help="Print the names of all tasks and stop.")] = False,
    samples: Annotated[Path | None, typer.Option(help="Write every question and answer to this JSONL file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
    max_num_seqs: Annotated[int | None, typer.Option(help="Most questions answered together.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt and answer, tokens.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="wint4, wint8, on a GPU fp8; none: floats.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, bfloat16, int8 (CPU) or fp8 (GPU).")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or split (experts on the CPU).")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
) -> None:
    """Score a model on tasks of the lm-evaluation-harness (pip install 'tern-llm[eval]').

    Without --chat tasks are continued as plain text; those that compare likelihoods need that. With --chat a task's
    own limit of tokens, made for short continuations, does not hold: --max-tokens does.
    """
    from tern.evaluation import Evaluation, EvaluationPlan, task_names

    if list_tasks:
        typer.echo("\n".join(task_names(tasks_dir)))
        return
    named = [name.strip() for name in tasks.split(",") if name.strip()]
    if not named:
        raise OptionError("There is nothing to evaluate: name --tasks; --list-tasks prints those there are.")
    _check_counts({"--limit": (limit, 1), "--num-fewshot": (num_fewshot, 0), "--max-tokens": (max_tokens, 1)})
    if not chat and (system is not None or not thinking):
        raise OptionError(f"{'--no-thinking' if system is None else '--system'} is for conversations: add --chat.")
    if samples is not None and not samples.absolute().parent.is_dir():
        raise OptionError(f"--samples is {samples}: its directory does not exist.")
    generation: Mapping[str, float | int | None] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    evaluation = Evaluation(
        EvaluationPlan(
            tasks=named,
            chat=chat,
            thinking=thinking,
            limit=limit,
            num_fewshot=num_fewshot,
            max_tokens=max_tokens,
            generation={name: value for name, value in generation.items() if value is not None},
            system=system,
            tasks_directory=tasks_dir,
        )
    )

    from tern.llm import LLM

    options: dict[str, Any] = {"max_num_seqs": max_num_seqs, "max_model_len": max_model_len}
    llm = LLM(
        model,
        dtype=dtype,
        revision=revision,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        device=device,
        **{name: value for name, value in options.items() if value is not None},
    )
    report = evaluation.run(llm, model or "embedded")
    if samples is not None:
        _write_samples(report, samples)
    if as_json:
        typer.echo(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        _print(report)


def _check_counts(counts: Mapping[str, tuple[int | None, int]]) -> None:
    for flag, (value, least) in counts.items():
        if value is not None and value < least:
            raise OptionError(f"{flag} is {value}: it must be a whole number of at least {least}.")


def _print(report: EvaluationReport) -> None:
    table = Table("task", "metric", "filter", "value", "±", "questions", "shots", box=None)
    for score in report.scores:
        error = "" if score.stderr is None else f"{score.stderr:.4f}"
        counts = ("" if number is None else str(number) for number in (score.samples, score.num_fewshot))
        table.add_row(score.task, score.metric, score.filter, f"{score.value:.4f}", error, *counts)
    Console().print(table)
    typer.echo(f"{report.model}: {report.seconds:.1f} s.")


def _write_samples(report: EvaluationReport, path: Path) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            for task, asked in report.samples.items():
                for sample in asked:
                    file.write(json.dumps({"task": task, **sample}, ensure_ascii=False, default=str) + "\n")
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror}.") from None
