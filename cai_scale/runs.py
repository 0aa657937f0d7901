"""The folder of a run: the one owner of its file names. Stages read and write through it."""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from cai_scale.errors import ConfigError, DataError, MissingError
from cai_scale.records import checksums, read_json, replacing, write_json

SCHEMA = 1
ROOT = Path("runs")
# Settings that a continued run may change: a server may have moved, a budget may be raised, and
# the audit decides whether a run goes on, not how.
MAY_CHANGE = (
    "audit",
    *("sampler_url", "judge_url", "judge_concurrency", "judge_deadline"),
    *("judge_max_tokens", "judge_max_cost", "judge_prices"),
)


@dataclass(frozen=True)
class Trained:
    """Where a training goes: its product, its checkpoints, its figures."""

    path: Path

    @property
    def adapter(self) -> Path:
        """The trained LoRA adapter."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The trained model, where it was trained whole."""
        return self.path / "model"

    @property
    def product(self) -> Path | None:
        """The adapter or the model, whichever is there: each appears whole, by a rename."""
        return next((path for path in (self.adapter, self.model) if path.is_dir()), None)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def head(self) -> Path:
        """The reward head that rlaif trains beside its product."""
        return self.path / "reward_head.safetensors"


@dataclass(frozen=True)
class Round(Trained):
    """The files of one on-policy round; rounds count from 1."""

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts.jsonl"

    def revisions(self, attempt: int = 1) -> Path:
        """The revisions of the Nth try, N from 1."""
        return self.path / ("revisions.jsonl" if attempt == 1 else f"revisions-{attempt}.jsonl")

    def all_revisions(self) -> tuple[Path, ...]:
        """The revisions of every try, as far as they exist, in order."""
        return tuple(takewhile(Path.exists, (self.revisions(n) for n in count(1))))

    @staticmethod
    def critiques(revisions: Path) -> Path:
        """What the policy found wanting before it wrote a file of revisions."""
        return revisions.with_name(revisions.name.replace("revisions", "critiques"))

    @staticmethod
    def scores(answers: Path) -> Path:
        """The critic's scores of a file of answers, row by row."""
        return answers.with_suffix(".scores.jsonl")

    @staticmethod
    def comparisons(of: Path) -> Path:
        """A judge's verdicts on answers of a file, two together."""
        return of.with_suffix(".comparisons.jsonl")

    @property
    def pairs(self) -> Path:
        return self.path / "pairs.jsonl"

    @property
    def refused(self) -> Path:
        """A row for each answer, comparison and prompt that gave no pair, and why."""
        return self.path / "refused.jsonl"

    @property
    def references(self) -> Path:
        """What the base model gives the pairs: see `training.references`."""
        return self.path / "references.json"

    @property
    def audit(self) -> Path:
        return self.path / "audit.json"


@dataclass(frozen=True)
class Run(Trained):
    """A run folder. It is finished when `summary.json` exists, which is written last."""

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def constitution(self) -> Path:
        return self.path / "constitution.json"

    def prompts(self, kind: str) -> Path:
        """The run's own copy of its prompts; `kind` is "train" or "heldout"."""
        return self.path / "prompts" / f"{kind}.jsonl"

    @property
    def rounds(self) -> int:
        """How many rounds the run takes; 1 where it does not say."""
        with contextlib.suppress(DataError):
            rounds = self.settings().get("rounds")
            return rounds if isinstance(rounds, int) and rounds > 0 else 1
        return 1

    def trained(self, round: int) -> Trained:
        """Where the training of a round goes; that of the last one is the run's own."""
        return self if round == self.rounds else self.round(round)

    def policy(self, when: str) -> Path:
        """The exported graph that answers while a stage runs; removed afterwards."""
        return self.path / f".policy-{when}"

    def remove_policies(self) -> None:
        """Remove exported policies, those too that a killed start left."""
        for folder in self.path.glob(".policy-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def labels(self, rank: int = 0) -> Path:
        """The journal of a rank's judge: see `critics.judge.journal`."""
        return self.path / ("labels.sqlite" if rank == 0 else f"labels-{rank}.sqlite")

    def all_labels(self) -> tuple[Path, ...]:
        return tuple(sorted(self.path.glob("labels*.sqlite")))

    @property
    def costs(self) -> Path:
        """For every stage, the seconds that it took and the memory that rank 0 held at most."""
        return self.path / "costs.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def bundle(self) -> Path:
        return self.path / "bundle"

    @property
    def bundles(self) -> Path:
        """Which bundles were compared, where a folder has no run but an evaluation of two."""
        return self.path / "bundles.json"

    @property
    def chain(self) -> Path:
        """What each stage read and wrote, by SHA-256: see `chain.py`."""
        return self.path / "chain.json"

    @property
    def exports(self) -> Path:
        """The SHA-256 of the manifest of each bundle made from the run, as `sha256sum` reads it."""
        return self.path / "exports.sha256"

    def exported(self) -> dict[str, str]:
        """The content of `exports`: the name of a manifest, from the run → its SHA-256.

        Raises:
            DataError: the file is not as it was written.
        """
        text = self.exports.read_text("utf-8") if self.exports.is_file() else ""
        found = re.findall(r"^([0-9a-f]{64})  (.+)\n", text, re.MULTILINE)
        kept = {name: digest for digest, name in found}
        if checksums(kept) != text:
            raise DataError(f"{self.exports} is not as it was written; remove it and export again")
        return kept

    def keep_export(self, manifest: Path, digest: str) -> None:
        """Keep the SHA-256 of a bundle's manifest; a bundle made anew takes the place of the old.

        The run's own hashes do not cover this file, which is written after the run is finished.
        """
        name = Path(os.path.relpath(manifest, self.path)).as_posix()
        kept = {**self.exported(), name: digest}
        with replacing(self.exports) as file:
            file.write(checksums(kept))

    def name_of(self, file: Path) -> str:
        """A file's name within the run."""
        return file.relative_to(self.path).as_posix()

    @property
    def finished(self) -> bool:
        return self.summary.is_file()

    def round(self, number: int) -> Round:
        return Round(self.path / "rounds" / str(number))

    def evaluation(self, when: str) -> Path:
        """The answers of an evaluation; `when` is "before" or "after". Beside them lie their
        "measures", and the "scores" of a critic that is not the lexicon."""
        return self.path / "evaluation" / f"{when}.jsonl"

    @property
    def record(self) -> dict[str, Any]:
        """What the run was started with: the content of `config.json`.

        Raises:
            DataError: the file is not one of a run.
        """
        record = read_json(self.config)
        parts = ("settings", "constitution", "weights", "prompts", "precision", "ranks")
        if record.get("schema") != SCHEMA or not all(
            isinstance(record.get(part), dict) for part in parts
        ):
            raise DataError(f"{self.config} is not the config.json of a run; restore the file")
        return record

    def settings(self) -> dict[str, Any]:
        """The settings that the run was started with."""
        return dict(self.record["settings"])

    def add_cost(self, stage: str, seconds: float, memory: int) -> None:
        """Add to what a stage has cost, over all starts of the run; `memory` in bytes."""
        costs = read_json(self.costs) if self.costs.is_file() else {}
        before = costs.get(stage, {"seconds": 0.0, "peak_memory_bytes": 0})
        costs[stage] = {
            "seconds": round(before["seconds"] + seconds, 3),
            "peak_memory_bytes": max(before["peak_memory_bytes"], memory),
        }
        write_json(self.costs, costs)


def versions(*names: str) -> dict[str, str]:
    """The versions of those distributions that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that holds something else or a finished run.

    Raises:
        ConfigError: the folder is a file, is not a run, or holds a finished one.
    """
    run = Run(path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output {path} is a file; choose a folder")
    # A start that was killed at once may leave a file written aside, whose name has a dot.
    foreign = path.is_dir() and any(not p.name.startswith(".") for p in path.iterdir())
    if foreign and not _is_run(run):
        raise ConfigError(f"output {path} holds files that are not a run's; choose another folder")
    if run.finished and not overwrite:
        raise ConfigError(
            f"output {path} already holds a finished run; choose another or add --overwrite"
        )


def _is_run(run: Run) -> bool:
    """Whether the folder is a run: any model's folder has a `config.json` too."""
    with contextlib.suppress(DataError):
        return bool(run.record)
    return False


def open_run(path: Path, record: Mapping[str, Any], *, overwrite: bool) -> tuple[Run, bool]:
    """Start a run, or continue one that was started with the same record.

    Args:
        record: what identifies the run; written to `config.json` at the first start.

    Returns:
        The run, and whether it continues an earlier start.

    Raises:
        ConfigError: the folder cannot be used, or holds a run of other settings.
    """
    check_output(path, overwrite=overwrite)
    run = Run(path)
    if overwrite and path.is_dir():
        shutil.rmtree(path)
    if run.config.is_file():
        _same(run, record)
        return run, True
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output {path} cannot be created ({error.strerror}); choose another folder"
        ) from None
    write_json(run.config, {"schema": SCHEMA, **record})
    return run, False


def _same(run: Run, record: Mapping[str, Any]) -> None:
    """A run continues only with what it was started with; where it ran may differ."""
    before = run.record
    now = json.loads(json.dumps(record))
    for part in (before, now):
        for name in MAY_CHANGE:
            part["settings"].pop(name, None)
    parts = ["settings", "constitution", "weights", "prompts", "precision", "sampler", "ds_config"]
    parts += ["critic", "start"]
    if any(run.path.rglob("checkpoint-*")) and run.product is None:
        parts.append("ranks")  # an optimizer's state lies in as many pieces as there were ranks
    for part in parts:
        if before.get(part) != now[part]:
            old, new = before.get(part) or {}, now[part] or {}
            changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
            key = changed[0]
            raise ConfigError(
                f"output {run.path} holds an unfinished run with another {part}.{key}: "
                f"{old.get(key)!r} there, {new.get(key)!r} here; set it back, choose another "
                f"--output, or add --overwrite"
            )


def finished(path: Path | None) -> Run:
    """The run in that folder, or the newest finished one where none is named.

    Raises:
        MissingError: there is none, or it is not finished.
    """
    if path is None:
        return newest(ROOT, finished=True)
    run = Run(path)
    if not run.finished:
        raise MissingError(
            f"{path} holds no finished run; finish one with "
            f"'cai-scale evaluate --output {path} --resume'"
        )
    if read_json(run.summary).get("schema") != SCHEMA:
        raise DataError(f"{run.summary} is not the summary of a run; restore the file")
    return run


def newest(root: Path, *, finished: bool) -> Run:
    """The run under `root` that was started last and is, or is not, finished.

    Raises:
        MissingError: there is none.
    """
    runs = [Run(config.parent) for config in root.glob("*/config.json")]
    runs = [run for run in runs if run.finished == finished]
    if not runs:
        kind = "finished" if finished else "unfinished"
        raise MissingError(
            f"no {kind} run under {root}/; start one with "
            f"'deepspeed launch/train.py --ds_config zero2.json', or name one"
        )
    return max(runs, key=lambda run: run.config.stat().st_mtime_ns)
