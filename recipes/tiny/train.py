"""Train the embedded model: ``python -m recipes.tiny.train``, or ``torchrun --nproc-per-node 2 -m recipes.tiny.train``.

Resumes from the run folder's last checkpoint if there is one. ``--smoke`` is a short run of a much smaller network
that shows the machinery works.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import Ernie4_5_MoeConfig

from recipes.tiny import data, optimizer
from recipes.tiny.conversation import CHECKPOINT, END_OF_TURN, TEMPLATE
from recipes.tiny.network import TinyErnie, save_checkpoint, tiny_config
from recipes.tiny.team import Team, join_team
from recipes.tiny.tokenizer import save_tokenizer, train_tokenizer

NUDGE = 0.0005
"""Change of an expert's selection bias per step, at the full learning rate."""
SAVE_EVERY = 150
REPORT_EVERY = 50


@dataclass(frozen=True)
class Plan:
    """How long and on what to train."""

    steps: int = 12500
    batch_tokens: int = 8192
    seed: int = 0
    tokenizer_examples: int = 12000
    copying_until: float = 0.3
    """Share of the run with copying exercises among the conversations."""
    prompts_until: float = 0.35
    """Share of the run in which the prompts' tokens are weak targets too."""


SMOKE = Plan(steps=120, batch_tokens=2048, tokenizer_examples=500, copying_until=0.0, prompts_until=0.0)


def smoke_config(config: Ernie4_5_MoeConfig) -> Ernie4_5_MoeConfig:
    """The same kind of network, small enough for a test."""
    small = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "moe_layer_end_index": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "moe_intermediate_size": 16}
    return Ernie4_5_MoeConfig.from_dict(config.to_dict() | small)


class Trainer:
    """A model, its optimisers and how far it is."""

    def __init__(self, plan: Plan, config: Ernie4_5_MoeConfig, tokenizer: Tokenizer, run: Path, team: Team) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.tokenizer, self.run, self.team = plan, tokenizer, run, team
        self.model = TinyErnie(config)
        self.optimizers = optimizer.build(self.model, team)
        self.rates = [one.param_groups[0]["lr"] for one in self.optimizers]
        self.step = 0
        self.seconds = 0.0
        """Time spent training, over all sittings."""
        if self.state_file.exists():
            self.load()

    @property
    def state_file(self) -> Path:
        """Where the state for resuming lies."""
        return self.run / "state.pt"

    def save(self) -> None:
        """Write the state for resuming; it is the same in every process of the team."""
        if self.team.rank > 0:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.state_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.state_file)

    def load(self) -> None:
        """Read the state written by `save`."""
        state = torch.load(self.state_file)
        self.model.load_state_dict(state["model"])
        for one, saved in zip(self.optimizers, state["optimizers"], strict=True):
            one.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def batches(self) -> Iterator[data.Batch]:
        """Training data from the present step on; each pool's seed is its first step."""
        while True:
            progress = self.step / self.plan.steps
            yield from data.batches(
                random.Random(f"{self.plan.seed}/{self.team.rank}/{self.step}"),
                self.tokenizer,
                self.plan.batch_tokens // self.team.size,
                prompt_weight=0.15 if progress < self.plan.prompts_until else 0.0,
                copying_share=0.25 if progress < self.plan.copying_until else 0.0,
            )

    def learn(self, batch: data.Batch) -> dict[str, list[float]]:
        """One step; returns the loss in nats per token of every sequence, by skill."""
        share = optimizer.rate(self.step, self.plan.steps)
        for one, full in zip(self.optimizers, self.rates, strict=True):
            one.param_groups[0]["lr"] = full * share
        weights = batch.weights[:, 1:].flatten()
        targets = weights.nonzero()[:, 0]
        hidden = self.model.hidden(batch.ids[:, :-1]).flatten(0, 1).index_select(0, targets)
        losses = F.cross_entropy(self.model.head(hidden), batch.ids[:, 1:].flatten()[targets], reduction="none")
        losses = losses * weights[targets]
        (losses.sum() / weights.sum() / self.team.size).backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.team.add_up([*gradients, *(router.load for router in self.model.routers())])
        for one in self.optimizers:
            one.step()
            one.zero_grad()
        for router in self.model.routers():
            router.nudge(NUDGE * share)
        self.step += 1
        return losses_by_skill(batch, losses.detach(), targets)


def losses_by_skill(batch: data.Batch, losses: torch.Tensor, targets: torch.Tensor) -> dict[str, list[float]]:
    """Weighted losses [targets] as the mean per target token of each sequence, grouped by skill."""
    rows = targets // (batch.ids.shape[1] - 1)
    means = torch.zeros(len(batch.skills)).index_add_(0, rows, losses) / batch.weights[:, 1:].sum(1)
    grouped: dict[str, list[float]] = {}
    for skill, mean in zip(batch.skills, means.tolist(), strict=True):
        grouped.setdefault(skill, []).append(mean)
    return grouped


def export(model: TinyErnie, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the whole Hugging Face checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, folder)
    save_tokenizer(tokenizer, folder)
    ends = [2, tokenizer.token_to_id(END_OF_TURN)]
    generation = {"bos_token_id": 1, "eos_token_id": ends, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 512}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    if folder.resolve() != TEMPLATE.parent:
        shutil.copy(TEMPLATE, folder)


def train(plan: Plan, run: Path, team: Team, smoke: bool = False) -> tuple[Trainer, list[float]]:
    """Train to the plan's end and export to ``run/checkpoint``; returns the trainer and each step's mean loss."""
    run.mkdir(parents=True, exist_ok=True)
    saved_tokenizer = run / "tokenizer.json"
    if team.rank == 0 and not saved_tokenizer.exists():
        train_tokenizer(plan.tokenizer_examples).save(str(saved_tokenizer))
    team.wait()
    tokenizer = Tokenizer.from_file(str(saved_tokenizer))
    config = tiny_config(tokenizer.get_vocab_size(), [2, tokenizer.token_to_id(END_OF_TURN)])
    trainer = Trainer(plan, smoke_config(config) if smoke else config, tokenizer, run, team)
    losses: list[float] = []
    recent: dict[str, float] = {}
    last = time.monotonic()
    with tqdm(total=plan.steps, initial=trainer.step, unit="step", mininterval=10, disable=team.rank > 0) as bar:
        for batch in trainer.batches():
            if trainer.step >= plan.steps:
                break
            grouped = trainer.learn(batch)
            losses.append(sum(map(sum, grouped.values())) / len(batch.skills))
            for skill, values in grouped.items():
                mean = sum(values) / len(values)
                recent[skill] = 0.9 * recent.get(skill, mean) + 0.1 * mean
            bar.update()
            now = time.monotonic()
            trainer.seconds, last = trainer.seconds + now - last, now
            if trainer.step % SAVE_EVERY == 0:
                trainer.save()
            if trainer.step % REPORT_EVERY == 0 and team.rank == 0:
                report = {skill: round(loss, 4) for skill, loss in sorted(recent.items())}
                tqdm.write(json.dumps({"step": trainer.step, "minutes": round(trainer.seconds / 60, 1), **report}))
    trainer.save()
    if team.rank == 0:
        export(trainer.model, tokenizer, run / "checkpoint")
    return trainer, losses


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train Tern's embedded demonstration model.")
    parser.add_argument("--folder", type=Path, default=Path("build/tiny"), help="folder for state and checkpoint")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: the published model's)")
    parser.add_argument("--smoke", action="store_true", help="a one-minute run of a much smaller network")
    parser.add_argument("--install", action="store_true", help="copy the checkpoint to tern/embedded/tiny")
    options = parser.parse_args()
    plan = SMOKE if options.smoke else Plan()
    plan = replace(plan, steps=options.steps or plan.steps)
    team = join_team()
    trainer, _ = train(plan, options.folder, team, smoke=options.smoke)
    if team.rank > 0:
        return
    print(f"{trainer.step} steps, {trainer.seconds / 60:.0f} minutes: {options.folder / 'checkpoint'}")
    if options.install:
        export(trainer.model, trainer.tokenizer, CHECKPOINT)


if __name__ == "__main__":
    main()
