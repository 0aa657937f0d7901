"""The only place where stages meet: collect, train, evaluate, report."""

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cai_scale import chain, labels, ranks, results
from cai_scale.chain import of_round
from cai_scale.critics import LEXICONS
from cai_scale.critics.reward import TorchRewardModel
from cai_scale.errors import MissingError
from cai_scale.evaluation import protocol
from cai_scale.evaluation.likelihood import Reader
from cai_scale.job import Job
from cai_scale.methods import load_method
from cai_scale.preferences.audit import audit_again, require_enough
from cai_scale.preferences.limits import judge, require_sound
from cai_scale.preferences.pairs import read_pairs
from cai_scale.records import Answer, Pair, Response, read_json, write_json, write_jsonl
from cai_scale.rollout.choose import Choice
from cai_scale.rollout.onnx import OnnxSampler
from cai_scale.rollout.remote import RemoteSampler
from cai_scale.rollout.sampler import Sampler, TransformersSampler
from cai_scale.runtime.bundle import open_bundle
from cai_scale.runtime.generate import Policy
from cai_scale.training import models, reader, rewards
from cai_scale.training.task import Task

STAGES = ("collect", "train", "evaluate")


def execute(job: Job, until: str = STAGES[-1]) -> None:
    """Run the stages in order, up to and including `until`; what exists already is kept."""
    for number in range(1, job.config.rounds + 1):
        answers, pairs = collect(job, number)
        if until == "collect":
            return
        train(job, number, answers, pairs)
    if until == "evaluate":
        evaluate(job)


def collect(job: Job, number: int) -> tuple[list[Answer], list[Pair]]:
    """Sample from the policy as it is, revise, score and pair, if the method begins with that.

    The first round also answers the held-out prompts as they are before.
    """
    config, files, start = job.config, job.run.round(number), _start(job, number)
    with _answering(job, start) as answering:
        if number == 1 and start is None and config.method != "reward":
            _answer_heldout(job, "before", answering)
        if not config.collects:
            return [], []
        sampler = answering(config)
        with job.stage(of_round("rollout", number)):
            responses = results.rollouts(
                config, job.prompts, files, sampler, job.ranks, round=number
            )
        with job.stage(of_round("revise", number)):
            responses, scores = labels.answers(
                config,
                job.constitution,
                job.critic,
                job.comparer,
                job.prompts,
                responses,
                files,
                sampler,
                job.ranks,
            )
    with job.stage(of_round("pair", number)):
        compared = None
        if job.comparer is not None and config.pairs == "answers":
            compared = labels.comparisons(
                config, job.constitution, job.comparer, job.prompts, responses, files, job.ranks
            )
        if job.ranks.main and not files.pairs.exists():
            pairs, figures, refused = labels.pairs(
                config, job.prompts, files, responses, scores, compared
            )
            write_json(files.audit, figures)
            write_jsonl(files.refused, refused)
            write_jsonl(files.pairs, pairs)
        ranks.wait_for(files.pairs)
    pairs = read_pairs(files.pairs)
    job.say(f"{len(pairs)} pairs from {len(job.prompts)} prompts: {files.pairs}")
    return labels.scored(job.prompts, responses, scores), pairs


def train(job: Job, number: int, answers: list[Answer], pairs: list[Pair]) -> None:
    """Train one round's adapter or model on its data, from where the round before ended."""
    config, into = job.config, job.run.trained(number)
    if into.product is not None:
        return
    if config.pairwise:
        _require_sound(job, number, pairs)
    with job.stage(of_round("train", number)):
        load_method(config.method).train(
            Task(
                config=config,
                ranks=job.ranks,
                precision=job.precision,
                ds_config=job.ds_config,
                into=into,
                start=_start(job, number),
                round=number,
                prompts=job.prompts,
                answers=answers,
                pairs=pairs,
                references=job.run.round(number).references,
                weights=job.run.record["weights"],
                critic=job.critic,
                sampler=_live(job),
            )
        )
        ranks.wait_for(into.adapter, into.model)
    if job.ranks.main:  # a training that samples has left the base model's graph
        job.run.remove_policies()
    gc.collect()


def _require_sound(job: Job, number: int, pairs: list[Pair]) -> None:
    """Audit the pairs as they are stored: warn, or refuse to train on them."""
    config, figures = job.config, read_json(job.run.round(number).audit)
    require_enough(pairs, config.batch_size, figures)
    # To ask a lexicon again costs nothing.
    critic = job.critic if config.critic in LEXICONS else None
    findings = judge(audit_again(figures, pairs, critic))
    fatal = "refuse" if config.audit == "refuse" else None
    for finding in findings:
        if finding.level not in ("ok", fatal):
            job.say(f"warning: {finding.text}")
    if fatal:
        require_sound(
            findings,
            f"mend the cause and begin anew with --overwrite, or train on them all the same with "
            f"--resume --output {job.run.path} --audit warn",
        )


def evaluate(job: Job) -> None:
    """Answer the held-out prompts again with what was trained; compare; report; summarise."""
    from cai_scale.evaluation.report import write_report
    from cai_scale.evaluation.table import print_summary

    product = job.run.product
    if product is None:
        raise MissingError(
            f"{job.run.path} has trained nothing to evaluate; do that with 'cai-scale train'"
        )
    if job.config.method == "reward":
        return evaluate_reward(job)
    with _answering(job, None) as answering:
        before = _answer_heldout(job, "before", answering)
    with _answering(job, product) as answering:
        after = _answer_heldout(job, "after", answering)
    with job.stage("measure"):
        measured = results.measured(
            job.heldout, job.run, before, after, lambda: _readers(job, product), job.ranks
        )
    if job.ranks.main:
        answered = results.answered(job.evaluator, job.heldout, before, after, measured)
        summary = results.summary(job.config, job.run, job.constitution, job.evaluator, answered)
        write_report(job.run, summary, answered, job.constitution)
        digest = chain.finish(job.run, summary)
        print_summary(summary, job.constitution)
        print(f"report: {job.run.report}\nchain sha256: {digest}")


def evaluate_reward(job: Job) -> None:
    """Let the reward model score new answers to the held-out prompts, beside the critic."""
    from cai_scale.evaluation.rewards import print_rewards

    product, run = job.run.evaluation("predicted"), job.run
    with job.stage("evaluate"), _answering(job, None) as answering:
        responses = results.reward_answers(
            job.config, job.heldout, run, answering(job.config), job.ranks
        )
        file = run.evaluation("rewards")
        text = {prompt.id: prompt.text for prompt in job.heldout}
        asked = [text[response.prompt_id] for response in responses]
        scores = labels.score_once(
            job.critic, asked, responses, run.round(1).scores(file), job.ranks
        )
        answers = labels.scored(job.heldout, responses, scores)
        if job.ranks.main and not product.exists():
            model = TorchRewardModel(rewards.of_run(run, job.constitution))
            texts = [answer.response.text for answer in answers]
            outputs = model.raw([answer.prompt.text for answer in answers], texts).tolist()
            write_jsonl(
                product,
                (
                    {
                        "prompt_id": answer.prompt.id,
                        "sample": answer.response.sample,
                        "predicted": dict(zip(model.labels, row, strict=True)),
                    }
                    for answer, row in zip(answers, outputs, strict=True)
                ),
            )
        ranks.wait_for(product)
    if job.ranks.main:
        summary = results.reward_summary(job.config, run, job.constitution, answers)
        digest = chain.finish(run, summary)
        print_rewards(summary["reward"])
        print(f"chain sha256: {digest}")


def _start(job: Job, number: int) -> Path | None:
    """What a round samples from and trains on: the round before, or --start, or nothing."""
    return job.start if number == 1 else job.run.trained(number - 1).product


def _answer_heldout(job: Job, when: str, answering: "Answering") -> list[Response]:
    """The answers to the held-out prompts, by the frozen protocol."""
    with job.stage(f"evaluate {when}"):
        sampler = answering(protocol.DECODING)
        return results.heldout(job.heldout, job.run, when, sampler, job.ranks)


def _readers(job: Job, product: Path) -> tuple[Reader, Reader]:
    """The base model and what was trained from it, to read the answers of both."""
    tokenizer = models.load_tokenizer(job.config.model)
    return reader.readers(job.config.model, product, job.precision.dtype, tokenizer)


@contextmanager
def _answering(job: Job, product: Path | None) -> Iterator["Answering"]:
    """What makes samplers, by their decoding, of the base model or of what was trained from it.

    They share one model, or one exported graph, which is loaded when the first answer is sampled.
    A server answers only what is trained on: what is evaluated comes from the files at hand.
    """
    tokenizer = models.load_tokenizer(job.config.model)
    graph = job.run.policy(product.name if product else "base")
    remotes: list[RemoteSampler] = []

    @functools.cache
    def model() -> Any:
        return models.load_trained(job.config.model, product, job.precision.dtype)

    @functools.cache
    def policy() -> Policy:
        return _policy(job, job.local, product, graph)

    def sampler(decoding: Any) -> Sampler:
        if job.sampler.name == "openai" and decoding is job.config:
            remotes.append(_remote(job, tokenizer, product))
            return remotes[-1]
        settings = _settings(decoding)
        if job.local.name == "transformers":
            return TransformersSampler(model, tokenizer, **settings)
        return OnnxSampler(policy, tokenizer, rows=job.config.rollout_batch_size, **settings)

    try:
        yield sampler
    finally:
        if job.ranks.main:  # it leaves last: every product has the answers of all ranks
            job.run.remove_policies()
            for remote in remotes:
                remote.close()
        gc.collect()


def _live(job: Job) -> Callable[[Path | None], Sampler] | None:
    """Samplers for a training that samples at every step; None where the weights in the process
    answer. A graph goes beside the policy that the training has saved, and is removed with it."""
    if job.sampler.name == "transformers":
        return None
    tokenizer = models.load_tokenizer(job.config.model)
    remotes: list[RemoteSampler] = []

    def sampler(product: Path | None) -> Sampler:
        if job.sampler.name == "openai":
            if job.ranks.main:  # all ranks have had their answers of the step before
                for remote in remotes:
                    remote.close()
            remotes[:] = [_remote(job, tokenizer, product)]
            return remotes[0]
        graph = product.with_name("graph") if product else job.run.policy("base")
        policy = functools.cache(lambda: _policy(job, job.sampler, product, graph))
        rows = job.config.rollout_batch_size
        return OnnxSampler(policy, tokenizer, rows=rows, **_settings(job.config))

    return sampler


def _remote(job: Job, tokenizer: Any, product: Path | None) -> RemoteSampler:
    config = job.config
    assert config.sampler_url is not None
    return RemoteSampler(
        config.sampler_url,
        config.sampler_model or config.model,
        tokenizer,
        rows=config.rollout_batch_size,
        adapter=product,
        **_settings(config),
    )


def _settings(decoding: Any) -> dict[str, Any]:
    return {name: getattr(decoding, name) for name in ("max_new_tokens", "top_p", "top_k")}


def _policy(job: Job, choice: Choice, product: Path | None, folder: Path) -> Policy:
    """The graph that the first rank to need one exports, on this rank's share of the cores."""
    from cai_export.policy import export_policy

    variant = "q8" if choice.name == "onnx-q8" else "fp32"
    try:
        folder.with_suffix(".taken").mkdir()
    except FileExistsError:
        ranks.wait_for(folder)
    else:
        export_policy(job.config.model, product, folder, (variant,), job.constitution)
    return Policy(open_bundle(folder), threads=ranks.threads(job.ranks))


Answering = Callable[[Any], Sampler]
