"""The only place where stages meet: collect, train, evaluate, report."""

import gc
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cai_scale import ranks
from cai_scale.errors import MissingError
from cai_scale.evaluation import protocol
from cai_scale.evaluation.compare import Answered, compare, drift, slices
from cai_scale.job import Job
from cai_scale.methods import load_method
from cai_scale.preferences.audit import audit, require_enough
from cai_scale.preferences.pairs import build_pairs, read_pairs
from cai_scale.records import (
    Response,
    read_json,
    write_json,
    write_jsonl,
)
from cai_scale.rollout.collect import collect, requests_for
from cai_scale.rollout.revise import RevisionRules, revise
from cai_scale.training import models

STAGES = ("collect", "train", "evaluate")


def execute(job: Job, until: str = STAGES[-1]) -> None:
    """Run the stages in order, up to and including `until`; what exists already is kept."""
    stages = {"collect": collect_pairs, "train": train, "evaluate": evaluate}
    for name in STAGES[: STAGES.index(until) + 1]:
        stages[name](job)


def collect_pairs(job: Job) -> None:
    """Answer the held-out prompts as they are before; sample, revise, score; build pairs."""
    files = job.run.round(1)
    if not files.pairs.exists():
        sampler = _sampler(job, job.config)
        with job.timed("evaluate before"):
            _answer_heldout(job, "before", adapter=None)
        with job.timed("rollout"):
            requests = requests_for(
                job.prompts,
                job.config.temperatures,
                samples=job.config.samples,
                seed=job.config.seed,
                round=1,
            )
            responses = collect(
                sampler,
                requests,
                files.rollouts,
                batch_size=job.config.rollout_batch_size,
                ranks=job.ranks,
                title="sampling",
            )
        with job.timed("revise"):
            responses = revise(
                sampler,
                job.critic,
                job.constitution,
                job.prompts,
                responses,
                files.revisions,
                rules=RevisionRules(tries=job.config.revisions),
                seed=job.config.seed,
                batch_size=job.config.rollout_batch_size,
                ranks=job.ranks,
            )
        with job.timed("pair"):
            if job.ranks.main:
                _write_pairs(job, responses)
            ranks.wait_for(files.pairs)
        del sampler
        gc.collect()
    pairs = read_pairs(files.pairs)
    job.say(f"{len(pairs)} pairs from {len(job.prompts)} prompts: {files.pairs}")


def train(job: Job) -> None:
    """Train an adapter on the pairs."""
    if job.run.adapter.is_dir():
        return
    files = job.run.round(1)
    pairs = read_pairs(files.pairs)
    require_enough(pairs, job.config.batch_size, read_json(files.audit))
    with job.timed("train"):
        load_method(job.config.method).train(
            job.config,
            pairs,
            job.run,
            ranks=job.ranks,
            precision=job.precision,
            ds_config=job.ds_config,
        )
        ranks.wait_for(job.run.adapter)
    gc.collect()


def evaluate(job: Job) -> None:
    """Answer the held-out prompts again with the adapter; compare; write report and summary."""
    from cai_scale.evaluation.report import write_report
    from cai_scale.evaluation.table import print_summary

    if not job.run.adapter.is_dir():
        raise MissingError(
            f"{job.run.path} has no adapter to evaluate; train it with 'cai-scale train'"
        )
    with job.timed("evaluate before"):
        before = _answer_heldout(job, "before", adapter=None)
    with job.timed("evaluate after"):
        after = _answer_heldout(job, "after", adapter=job.run.adapter)
    if job.ranks.main:
        answered = _score(job, before, after)
        summary = _summary(job, answered)
        write_report(job.run, summary, answered, job.constitution)
        write_json(job.run.summary, summary)
        print_summary(summary, job.constitution)
        print(f"report: {job.run.report}")


def _sampler(job: Job, decoding: Any, adapter: Path | None = None) -> Any:
    from cai_scale.rollout.sampler import TransformersSampler

    def load() -> Any:
        model = models.load_model(job.config.model, job.precision.dtype)
        return models.with_adapter(model, adapter) if adapter else model

    return TransformersSampler(
        load,
        models.load_tokenizer(job.config.model),
        max_new_tokens=decoding.max_new_tokens,
        top_p=decoding.top_p,
        top_k=decoding.top_k,
    )


def _answer_heldout(job: Job, when: str, *, adapter: Path | None) -> list[Response]:
    requests = requests_for(
        job.heldout,
        (protocol.DECODING.temperature,),
        samples=1,
        seed=protocol.SEED,
        round=0,
    )
    return collect(
        _sampler(job, protocol.DECODING, adapter),
        requests,
        job.run.evaluation(when),
        batch_size=protocol.BATCH_SIZE,
        ranks=job.ranks,
        title=f"answering {when}",
    )


def _write_pairs(job: Job, responses: Sequence[Response]) -> None:
    text = {prompt.id: prompt.text for prompt in job.prompts}
    scores = job.critic.score([text[r.prompt_id] for r in responses], [r.text for r in responses])
    pairs, account = build_pairs(job.prompts, responses, scores, margin=job.config.margin)
    files = job.run.round(1)
    write_json(files.audit, audit(pairs, account))
    write_jsonl(files.pairs, pairs)


def _score(job: Job, before: list[Response], after: list[Response]) -> list[Answered]:
    texts = [prompt.text for prompt in job.heldout]
    rows = zip(
        job.heldout,
        before,
        after,
        job.critic.score(texts, [r.text for r in before]),
        job.critic.score(texts, [r.text for r in after]),
        strict=True,
    )
    return [
        Answered(prompt=p, before=b, after=a, before_score=bs, after_score=as_)
        for p, b, a, bs, as_ in rows
    ]


def _summary(job: Job, answered: Sequence[Answered]) -> dict[str, Any]:
    return {
        "schema": 1,
        "method": job.config.method,
        "model": job.config.model,
        "constitution": job.constitution.sha256,
        "critic": job.critic.name,
        **compare(answered, job.constitution),
        "drift": drift(answered),
        "slices": slices(answered, job.constitution),
        "decoding": asdict(protocol.DECODING),
        "seeds": [protocol.SEED],
        "seconds": read_json(job.run.times),
    }
