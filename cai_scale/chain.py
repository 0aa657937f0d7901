"""The chain of a run: for every stage, the SHA-256 of each file that it read and that it wrote.

Hashes that lie beside the data find damage and careless edits. Whoever rewrites all of it to
fit is found only by a hash kept elsewhere: the chain's own, which the training prints last.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_scale.config import Config, from_dict
from cai_scale.errors import CaiError, DataError
from cai_scale.records import json_text, read_json, replacing, sha256, write_json
from cai_scale.runs import Run

SCHEMA = 1


@dataclass(frozen=True)
class Stage:
    """The files and folders that a stage reads and writes."""

    reads: tuple[Path, ...]
    writes: tuple[Path, ...]


def stages(run: Run) -> dict[str, Stage]:
    """All stages of a run by name, in their order."""
    config = _config(run)
    train, heldout = run.prompts("train"), run.prompts("heldout")
    before, after = run.evaluation("before"), run.evaluation("after")
    settings = (run.config, run.constitution)
    found = {"start": Stage((), (*settings, train, heldout))}
    if config.method != "reward":
        found["evaluate before"] = Stage((run.config, heldout), (before,))
    policy: tuple[Path, ...] = ()
    for number in range(1, run.rounds + 1):
        files, into = run.round(number), run.trained(number)
        data: tuple[Path, ...] = ()
        if config.collects:
            first, others = files.rollouts, [files.scores(files.rollouts)]
            for revised in files.all_revisions():
                others += [files.critiques(revised), revised, files.scores(revised)]
                others.append(files.comparisons(revised))
            found |= {
                of_round("rollout", number): Stage((run.config, train, *policy), (first,)),
                of_round("revise", number): Stage(
                    (*settings, train, first, *policy), tuple(others)
                ),
                of_round("pair", number): Stage(
                    (*settings, train, first, *others),
                    (
                        *(files.pairs, files.refused, files.audit),
                        files.comparisons(files.pairs),
                    ),
                ),
            }
            data = (first, *others, files.pairs)
        product = (into.adapter, into.model)
        found[of_round("train", number)] = Stage(
            (*settings, train, *data, *policy),
            (*product, into.head, into.metrics, into.checkpoints, files.references),
        )
        policy = product
    evaluated: tuple[Path, ...]
    if config.method == "reward":
        rewards = run.evaluation("rewards")
        evaluated = (rewards, run.round(1).scores(rewards), run.evaluation("predicted"))
        found["evaluate"] = Stage((*settings, heldout, *policy), evaluated)
    else:
        found["evaluate after"] = Stage((run.config, heldout, *policy), (after,))
        measures = run.evaluation("measures")
        found["measure"] = Stage((run.config, heldout, before, after, *policy), (measures,))
        evaluated = (before, after, measures)
    found["summary"] = Stage(
        (*settings, heldout, *evaluated, run.round(run.rounds).audit, run.metrics),
        (run.costs, run.report, run.summary, run.evaluation("scores"), *run.all_labels()),
    )
    return found


def _config(run: Run) -> Config:
    """The run's settings; the defaults where they cannot be read, which `verify` reports."""
    with suppress(CaiError):
        return from_dict(run.settings(), str(run.config))
    return Config()


def of_round(stage: str, number: int) -> str:
    """The name of a stage in a round; those of the first have no number."""
    return stage if number == 1 else f"{stage} {number}"


def digests(run: Run, paths: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of files, and of all files in folders, by their names within the run."""
    return {run.name_of(file): sha256(file) for file in files_of(paths)}


def files_of(paths: Iterable[Path]) -> list[Path]:
    """The files among the paths, and all files in the folders among them."""
    found: list[Path] = []
    for path in paths:
        found += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [path for path in found if path.is_file()]


def read(run: Run) -> dict[str, Any]:
    """What is recorded so far: stage → {"read": {name: SHA-256}, "wrote": {name: SHA-256}}.

    Raises:
        DataError: the file is not as it was written.
    """
    if not run.chain.is_file():
        return {}
    stages = read_json(run.chain).get("stages")
    if not isinstance(stages, dict) or not all(map(_is_record, stages.values())):
        raise DataError(f"{run.chain} is not as it was written; restore the file")
    return stages


def _is_record(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"read", "wrote"}
        and all(isinstance(part, dict) for part in value.values())
    )


def removed(run: Run, wrote: Iterable[str]) -> set[str]:
    """Checkpoints, where their folder is gone: they are working state that may be removed."""
    return {
        name
        for name in wrote
        if "checkpoints/" in name
        and not (run.path / name[: name.index("checkpoints/")] / "checkpoints").is_dir()
    }


@contextmanager
def recording(run: Run, name: str) -> Iterator[None]:
    """Record a stage: what it reads is hashed as it begins, what it wrote as it ends.

    A stage that was recorded by an earlier start, and whose files are there, keeps its record:
    what was done to them since must show.
    """
    earlier = read(run).get(name)
    if earlier and _there(run, earlier["wrote"]):
        yield
        return
    was_read = digests(run, stages(run)[name].reads)
    yield
    _add(run, {name: {"read": was_read, "wrote": digests(run, stages(run)[name].writes)}})


def finish(run: Run, summary: Mapping[str, Any]) -> str:
    """Record what is not yet recorded, write `summary.json` last, and return the chain's SHA-256.

    A start that was killed between writing a file and recording it leaves a stage out: such a
    stage is recorded as its files are now.
    """
    text = json_text(summary)
    recorded = read(run)
    missing = {
        name: {"read": digests(run, stage.reads), "wrote": digests(run, stage.writes)}
        for name, stage in stages(run).items()
        if name not in recorded or name == "summary"
    }
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    missing["summary"]["wrote"][run.name_of(run.summary)] = digest
    _add(run, missing)
    with replacing(run.summary) as file:
        file.write(text)
    return sha256(run.chain)


def _there(run: Run, wrote: Iterable[str]) -> bool:
    return all((run.path / name).exists() for name in {*wrote} - removed(run, wrote))


def _add(run: Run, links: Mapping[str, Any]) -> None:
    recorded = {**read(run), **links}
    ordered = {name: recorded[name] for name in stages(run) if name in recorded}
    write_json(run.chain, {"schema": SCHEMA, "stages": ordered})
