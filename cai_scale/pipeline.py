"""The only place where stages meet: collect, train, evaluate, report."""

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cai_scale import chain, ranks, results
from cai_scale.errors import MissingError
from cai_scale.evaluation import protocol
from cai_scale.job import Job
from cai_scale.methods import load_method
from cai_scale.preferences.audit import require_enough
from cai_scale.preferences.pairs import read_pairs
from cai_scale.records import Response, read_json, write_json, write_jsonl
from cai_scale.rollout.onnx import OnnxSampler
from cai_scale.rollout.sampler import Sampler, TransformersSampler
from cai_scale.runtime.bundle import open_bundle
from cai_scale.runtime.generate import Policy
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
        with _answering(job, "before", None) as answering:
            with job.stage("evaluate before"):
                _answer_heldout(job, "before", answering(protocol.DECODING))
            sampler = answering(job.config)
            with job.stage("rollout"):
                responses = results.rollouts(job.config, job.prompts, files, sampler, job.ranks)
            with job.stage("revise"):
                responses = results.revisions(
                    job.config,
                    job.constitution,
                    job.critic,
                    job.prompts,
                    responses,
                    files,
                    sampler,
                    job.ranks,
                )
        with job.stage("pair"):
            if job.ranks.main:
                pairs, figures = results.pairs(job.config, job.critic, job.prompts, responses)
                write_json(files.audit, figures)
                write_jsonl(files.pairs, pairs)
            ranks.wait_for(files.pairs)
    pairs = read_pairs(files.pairs)
    job.say(f"{len(pairs)} pairs from {len(job.prompts)} prompts: {files.pairs}")


def train(job: Job) -> None:
    """Train an adapter on the pairs."""
    if job.run.adapter.is_dir():
        return
    files = job.run.round(1)
    pairs = read_pairs(files.pairs)
    require_enough(pairs, job.config.batch_size, read_json(files.audit))
    with job.stage("train"):
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
    with job.stage("evaluate before"), _answering(job, "before", None) as answering:
        before = _answer_heldout(job, "before", answering(protocol.DECODING))
    with job.stage("evaluate after"), _answering(job, "after", job.run.adapter) as answering:
        after = _answer_heldout(job, "after", answering(protocol.DECODING))
    if job.ranks.main:
        answered = results.answered(job.critic, job.heldout, before, after)
        seconds = read_json(job.run.times)
        summary = results.summary(job.config, job.constitution, job.critic, answered, seconds)
        write_report(job.run, summary, answered, job.constitution)
        digest = chain.finish(job.run, summary)
        print_summary(summary, job.constitution)
        print(f"report: {job.run.report}\nchain sha256: {digest}")


@contextmanager
def _answering(job: Job, when: str, adapter: Path | None) -> Iterator[Callable[[Any], Sampler]]:
    """What makes the job's samplers, by their decoding, of the model with or without adapter.

    They share one model, or one exported graph, which is loaded when the first answer is sampled.
    """
    tokenizer = models.load_tokenizer(job.config.model)
    folder = job.run.policy(when)

    @functools.cache
    def model() -> Any:
        loaded = models.load_model(job.config.model, job.precision.dtype)
        return models.with_adapter(loaded, adapter) if adapter else loaded

    @functools.cache
    def policy() -> Policy:
        return _policy(job, adapter, folder)

    def sampler(decoding: Any) -> Sampler:
        settings: dict[str, Any] = {
            name: getattr(decoding, name) for name in ("max_new_tokens", "top_p", "top_k")
        }
        if job.sampler.name == "transformers":
            return TransformersSampler(model, tokenizer, **settings)
        rows = job.config.rollout_batch_size
        return OnnxSampler(policy, tokenizer, rows=rows, **settings)

    try:
        yield sampler
    finally:
        if job.ranks.main:  # it leaves last: every product has the answers of all ranks
            job.run.remove_policies()
    gc.collect()


def _policy(job: Job, adapter: Path | None, folder: Path) -> Policy:
    """The graph that the first rank to need one exports, on this rank's share of the cores."""
    from cai_export.policy import export_policy

    variant = "q8" if job.sampler.name == "onnx-q8" else "fp32"
    try:
        folder.with_suffix(".taken").mkdir()
    except FileExistsError:
        ranks.wait_for(folder)
    else:
        export_policy(job.config.model, adapter, folder, (variant,), job.constitution)
    return Policy(open_bundle(folder), threads=ranks.threads(job.ranks))


def _answer_heldout(job: Job, when: str, sampler: Sampler) -> list[Response]:
    return results.heldout(job.heldout, job.run, when, sampler, job.ranks)
