"""What follows from a run's settings and its stored answers. The pipeline writes it; `verify`
works it out again, by the same code. No torch.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cai_scale.config import Config
from cai_scale.constitution import Constitution
from cai_scale.critics import Critic
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.critics.remembered import Remembered
from cai_scale.errors import DataError
from cai_scale.evaluation import measures, protocol
from cai_scale.evaluation.compare import Answered, Measure, compare, slices
from cai_scale.evaluation.drift import drift
from cai_scale.evaluation.gain import judge_gain
from cai_scale.evaluation.halves import halves_gain
from cai_scale.evaluation.likelihood import Reader
from cai_scale.evaluation.matched import length_matched
from cai_scale.evaluation.refusals import safety
from cai_scale.evaluation.rewards import rewards
from cai_scale.evaluation.stuffing import stuffing
from cai_scale.evaluation.supported import supported
from cai_scale.evaluation.words import lengths, top_words
from cai_scale.ranks import Ranks, wait_for
from cai_scale.records import (
    Answer,
    Prompt,
    Response,
    read_json,
    read_jsonl,
    read_records,
    write_jsonl,
)
from cai_scale.rollout.collect import collect, requests_for
from cai_scale.rollout.sampler import Sampler
from cai_scale.runs import Round, Run

Measures = Mapping[str, Sequence[Measure]]  # of the answers "before" and "after"


def rollouts(
    config: Config,
    prompts: Sequence[Prompt],
    files: Round,
    sampler: Sampler,
    ranks: Ranks,
    *,
    round: int = 1,
) -> list[Response]:
    """The samples of a round; those that are stored already are not asked for again."""
    requests = requests_for(
        prompts, config.temperatures, samples=config.samples, seed=config.seed, round=round
    )
    return collect(
        sampler,
        requests,
        files.rollouts,
        batch_size=config.rollout_batch_size,
        ranks=ranks,
        title="sampling",
    )


def heldout(
    prompts: Sequence[Prompt], run: Run, when: str, sampler: Sampler, ranks: Ranks
) -> list[Response]:
    """The answers to the held-out prompts "before" or "after", by the frozen protocol."""
    requests = requests_for(
        prompts, (protocol.DECODING.temperature,), samples=1, seed=protocol.SEED, round=0
    )
    return collect(
        sampler,
        requests,
        run.evaluation(when),
        batch_size=protocol.BATCH_SIZE,
        ranks=ranks,
        title=f"answering {when}",
    )


def reward_answers(
    config: Config, prompts: Sequence[Prompt], run: Run, sampler: Sampler, ranks: Ranks
) -> list[Response]:
    """Answers to the held-out prompts for a reward model to score, sampled as those to train on."""
    requests = requests_for(
        prompts, config.temperatures, samples=config.samples, seed=config.seed, round=1
    )
    return collect(
        sampler,
        requests,
        run.evaluation("rewards"),
        batch_size=config.rollout_batch_size,
        ranks=ranks,
        title="answering",
    )


def predicted(run: Run, answers: Sequence[Answer]) -> tuple[list[str], NDArray[np.float64]]:
    """The stored outputs of a reward model for answers: its labels, and [answers, labels].

    Raises:
        DataError: they are of other answers.
    """
    file = run.evaluation("predicted")
    rows = read_records(file, lambda row: ((row["prompt_id"], row["sample"]), row["predicted"]))
    if [key for key, _ in rows] != [(a.prompt.id, a.response.sample) for a in answers]:
        raise DataError(f"{file} does not hold the scores of its answers; remove it")
    labels = list(rows[0][1]) if rows else []
    return labels, np.array([[row[label] for label in labels] for _, row in rows])


def reward_summary(
    config: Config, run: Run, constitution: Constitution, answers: Sequence[Answer]
) -> dict[str, Any]:
    """The content of `summary.json` of a reward model."""
    labels, outputs = predicted(run, answers)
    figures = rewards(
        answers,
        outputs,
        labels,
        margin=config.margin,
        constitution=constitution,
        objective=config.objective,
    )
    return {**_about(config, run, constitution), "reward": figures, **cost(run)}


def evaluator(config: Config, run: Run, constitution: Constitution, critic: Critic) -> Critic:
    """What scores the held-out answers: the lexicon, as often as it is asked; any other critic
    once, and what it said is kept."""
    if config.evaluator == LexiconCritic.name:
        return LexiconCritic(constitution)
    return Remembered(critic, run.evaluation("scores"))


def measured(
    prompts: Sequence[Prompt],
    run: Run,
    before: Sequence[Response],
    after: Sequence[Response],
    readers: Callable[[], tuple[Reader, Reader | None]],
    ranks: Ranks,
) -> Measures:
    """What is measured of the held-out answers; what is stored already is not measured again.

    Every rank measures its share of the prompts, and rank 0 joins what they found.

    Args:
        readers: loads the base model and the policy; None in its place leaves the KL out.
    """
    file = run.evaluation("measures")
    if not file.exists():
        parts = [
            file.with_name(f".{file.stem}-{rank}-of-{ranks.world}{file.suffix}")
            for rank in range(ranks.world)
        ]
        own, share = parts[ranks.rank], slice(ranks.rank, None, ranks.world)
        if not own.exists():
            base, policy = readers()
            asked, same = prompts[share], None if policy is None else base
            rows = measures.measure(asked, before[share], "before", base, same)
            rows += measures.measure(asked, after[share], "after", base, policy)
            write_jsonl(own, rows)
        if ranks.main:
            measures.join(parts, prompts, file)
    wait_for(file)
    if ranks.main:  # of a start that was killed, with another number of ranks perhaps
        for part in file.parent.glob(f".{file.stem}-*-of-*{file.suffix}"):
            part.unlink()
    return measures.read(file, prompts)


def answered(
    critic: Critic,
    prompts: Sequence[Prompt],
    before: Sequence[Response],
    after: Sequence[Response],
    measured: Measures | None = None,
) -> list[Answered]:
    """The held-out prompts with both of their answers, the scores of these and their measures."""
    unmeasured = [Measure()] * len(prompts)
    given = measured or {"before": unmeasured, "after": unmeasured}
    texts = [prompt.text for prompt in prompts]
    rows = zip(
        prompts,
        before,
        after,
        critic.score(texts, [r.text for r in before]),
        critic.score(texts, [r.text for r in after]),
        given["before"],
        given["after"],
        strict=True,
    )
    return [
        Answered(
            prompt=prompt,
            before=before,
            after=after,
            before_score=before_score,
            after_score=after_score,
            before_measure=before_measure,
            after_measure=after_measure,
        )
        for prompt, before, after, before_score, after_score, before_measure, after_measure in rows
    ]


def summary(
    config: Config,
    run: Run,
    constitution: Constitution,
    critic: Critic,
    answers: Sequence[Answered],
) -> dict[str, Any]:
    """The content of `summary.json`."""
    return {
        **_about(config, run, constitution),
        "critic": config.evaluator,
        **figures(constitution, critic, config.critic, answers),
        **cost(run),
    }


def figures(
    constitution: Constitution, critic: Critic, trained: str, answers: Sequence[Answered]
) -> dict[str, Any]:
    """What follows from the held-out answers, their scores and their measures.

    Args:
        critic: what has scored them.
        trained: the name of the critic that was trained on.
    """
    found = {
        **compare(answers, constitution),
        "length_matched": length_matched(answers, critic),
        "supported": supported(answers, constitution),
        "halves": halves_gain(answers, constitution, trained),
        "words": top_words(answers, constitution),
        "lengths": lengths(answers),
        "drift": drift(answers),
        "stuffing": stuffing(answers, constitution),
        "safety": safety(answers),
        "slices": slices(answers, constitution),
        "decoding": asdict(protocol.DECODING) | {"stop": list(protocol.DECODING.stop)},
        "seeds": [protocol.SEED],
    }
    return {**found, "gain": judge_gain(found)}


def _about(config: Config, run: Run, constitution: Constitution) -> dict[str, Any]:
    return {
        "schema": 1,
        "method": config.method,
        "model": config.model,
        "constitution": constitution.sha256,
        "trained_on": config.critic,
    }


def cost(run: Run) -> dict[str, Any]:
    """What a run took: seconds by stage, memory, tokens that were sampled to train on, and how
    many parameters were trained."""
    stages = read_json(run.costs)
    rounds = [run.round(number) for number in range(1, run.rounds + 1)]
    files = [
        file
        for r in rounds
        for file in (r.rollouts, *r.all_revisions(), *map(r.critiques, r.all_revisions()))
        if file.is_file()
    ]
    metrics = [file for n in range(1, run.rounds + 1) if (file := run.trained(n).metrics).is_file()]
    tokens = sum(row["tokens"] for file in files for _, row in read_jsonl(file))
    live = sum(row.get("sampled_tokens", 0) for file in metrics for _, row in read_jsonl(file))
    trained = [*(run.product.glob("*.safetensors") if run.product else ()), run.head]
    return {
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in stages.values()),
        "sampled_tokens": int(tokens + live),
        "trained_parameters": sum(map(_parameters, filter(Path.is_file, trained))),
    }


def _parameters(file: Path) -> int:
    """How many numbers a safetensors file holds: its header, whose length comes first, says."""
    with file.open("rb") as content:
        header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
    return sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
