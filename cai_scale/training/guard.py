"""Guards a training: looks at the policy every few steps, and keeps the best state that it saw.

At a look the policy answers `--guard_prompts` of the training prompts, the same ones with the same
random numbers each time, and the critic scores the answers. Their drift is the mean over tokens of
KL(policy‖base). There is a look before the first step, after every `--guard_steps` steps, and
after the last.

The training ends with the state that scored highest among those whose drift is within
`--guard_budget`, the earliest among equals. The policy before the first step counts, whatever its
drift: a training that only does harm ends as it began.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback

from cai_scale.ranks import agree
from cai_scale.records import Prompt, read_jsonl, write_json
from cai_scale.training import divergence, fit
from cai_scale.training.adapters import GUARD
from cai_scale.training.live import LivePolicy, Sampled, round_of
from cai_scale.training.models import load_tokenizer
from cai_scale.training.task import Task

FARTHEST = 2.0  # times the budget: a drift beyond ends the training
PATIENCE = 3  # so many looks without a better state end it too


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was seen of the policy after a step.

    Attributes:
        score: the mean over answers of the critic's overall score, 0 for an empty one.
        kl: the mean over the answers' tokens of KL(policy‖base), in nats; infinite where it is
            no number.
        words: the mean over answers.
    """

    step: int
    score: float
    kl: float
    words: float


def best(looks: Sequence[Look], budget: float) -> Look:
    """The highest score within the budget, the earliest among equals; the first always counts."""
    first, *later = looks
    return max([first, *(look for look in later if look.kl <= budget)], key=lambda look: look.score)


def reason_to_stop(looks: Sequence[Look], budget: float) -> str | None:
    """Why the training should go no further, if it should not."""
    last = looks[-1]
    if len(looks) > 1 and last.kl > FARTHEST * budget:
        return f"a drift of {last.kl:.3f} nats a token, over {FARTHEST:g} times the budget"
    since = sum(look.step > best(looks, budget).step for look in looks)
    return f"no better state at the last {since} looks" if since >= PATIENCE else None


def drawn(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """So many of the prompts, or all where there are fewer, in their order."""
    places = np.random.default_rng(seed).permutation(len(prompts))[:count]
    return [prompts[place] for place in sorted(places)]


def read_looks(metrics: Path) -> list[Look]:
    """What earlier starts of the training saw, as its figures say."""
    rows = (row for _, row in read_jsonl(metrics)) if metrics.exists() else ()
    return [
        Look(
            step=row["step"],
            score=row["guard/score"],
            kl=row.get("guard/kl", inf),
            words=row["guard/words"],
        )
        for row in rows
        if "guard/score" in row
    ]


class Guard(TrainerCallback):
    """Looks at the policy while it is trained. Called on every rank, which share the work.

    A state that is the best so far is kept as `fit.save` writes it. Until the next checkpoint the
    one that was the best before stays too, since a start that continues may go back to it.
    """

    def __init__(
        self, task: Task, trainer: Any, finish: Callable[[Path], None] | None = None
    ) -> None:
        """
        Args:
            finish: what makes an ordinary adapter or model of what is saved, as for `fit.fit`.
        """
        config = task.config
        self.task, self.trainer = task, trainer
        self.prompts = drawn(task.prompts, config.guard_prompts, config.seed)
        self.looks: list[Look] = []
        self._kept = task.into.path / ".kept"
        self._live = LivePolicy(
            replace(task, sampler=task.local),
            load_tokenizer(config.model),
            finish,
            folder=".guard",
        )

    @property
    def best(self) -> Look:
        return best(self.looks, self.task.config.guard_budget)

    @property
    def reason(self) -> str | None:
        """Why the training stops, once it does."""
        return reason_to_stop(self.looks, self.task.config.guard_budget)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what an earlier start saw up to its checkpoint: `MetricsLog` has forgotten the
        rest by now."""
        main = self.task.ranks.main
        earlier = read_looks(self.task.into.metrics) if main else []
        if earlier and not self._folder(best(earlier, self.task.config.guard_budget)).is_dir():
            earlier = []  # what was kept is gone, and the checkpoints with it: as at the beginning
        self.looks = agree(self.task.ranks, earlier)
        if not self.looks:
            self._look(control)
        elif self.reason:
            control.should_training_stop = True  # the trainer takes one step all the same

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, every = state.global_step, self.task.config.guard_steps
        if not self.reason and (step % every == 0 or step >= state.max_steps):
            self._look(control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No start goes back behind this checkpoint."""
        if self.task.ranks.main:
            for folder in self._kept.iterdir():
                if folder != self._folder(self.best):
                    shutil.rmtree(folder)

    def take_product(self, folder: Path) -> None:
        """Copy the best state to `folder`, with a note of what was seen of it; say which it is.
        For the main rank, after the training."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._folder(self.best), folder)
        write_json(folder / GUARD, {k: v for k, v in asdict(self.best).items() if isfinite(v)})
        print(self._verdict(), flush=True)

    def close(self) -> None:
        """Remove the states that were kept, when the product is in its place, and what the last
        look has left."""
        shutil.rmtree(self._kept, ignore_errors=True)
        self._live.close()

    def _look(self, control: Any) -> None:
        look = self._seen()
        self.looks.append(look)
        kept = self.best is look
        if kept:
            self._keep(look)
        figures = {
            "guard/score": look.score,
            "guard/kl": look.kl,
            "guard/words": look.words,
            "guard/kept": int(kept),
        }
        # Past the trainers of TRL, which would put the step's own figures into this row. A row
        # that is logged takes the step's turn to be, which is given back.
        turn = control.should_log
        Trainer.log(self.trainer, figures)
        control.should_log = turn
        if self.reason:
            control.should_training_stop = True

    def _seen(self) -> Look:
        task, step = self.task, self.trainer.state.global_step
        with self.trainer.accelerator.autocast():
            answers = self._live.sample(
                self.trainer,
                self.prompts,
                1,
                [min(task.config.temperatures)],
                round=round_of(task.round, 0),  # steps count from 1: nothing else has these numbers
            )
        return Look(
            step=step,
            score=_mean([answer.score.overall if answer.score else 0.0 for answer in answers]),
            kl=self._drift(answers),
            words=_mean([len(answer.completion.text.split()) for answer in answers]),
        )

    def _drift(self, answers: Sequence[Sampled]) -> float:
        mine = divergence.from_base(self.task, self.trainer, answers)
        records = [{"place": p, "kl": v if isfinite(v) else None} for p, v in mine.items()]
        sums = {record["place"]: record["kl"] for record in self._live.exchange(records)}
        if None in sums.values():
            return inf
        return float(sum(sums[p] for p in sorted(sums)) / sum(len(a.ids) for a in answers))

    def _folder(self, look: Look) -> Path:
        return self._kept / f"step-{look.step}"

    def _keep(self, look: Look) -> None:
        aside, folder = self._kept / ".saving", self._folder(look)
        if self.task.ranks.main:  # what a start that was killed has left
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
        fit.save(self.task, self.trainer, aside)
        if self.task.ranks.main:
            aside.rename(folder)

    def _verdict(self) -> str:
        first, last, kept = self.looks[0], self.looks[-1], self.best
        stopped = f"; stopped at step {last.step}: {self.reason}" if self.reason else ""
        if kept is first:
            return (
                f"guard: no state within the budget scored above {first.score:.4f}, that of the "
                f"policy before training: the product is the policy as it was{stopped}"
            )
        return (
            f"guard: the product is the policy of step {kept.step} of {last.step}: score "
            f"{kept.score:.4f}, {kept.score - first.score:+.4f} on step {first.step}, drift "
            f"{kept.kl:.3f} nats a token{stopped}"
        )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
