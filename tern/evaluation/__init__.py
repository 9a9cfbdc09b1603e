"""How good answers are: tasks of the lm-evaluation-harness, on a model in this process.

Knows the offline door and the harness, which `tern-llm[eval]` installs; knows no HTTP and no tensors.
"""

from tern.evaluation.report import EvaluationReport, TaskScore
from tern.evaluation.run import Evaluation, EvaluationPlan, task_names

__all__ = ["Evaluation", "EvaluationPlan", "EvaluationReport", "TaskScore", "task_names"]
