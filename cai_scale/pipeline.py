"""The only place where stages meet: collect, train, evaluate, report."""

import gc
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from cai_scale import prompts as prompt_files
from cai_scale import ranks
from cai_scale.config import Config, read_ds_config
from cai_scale.constitution import Constitution
from cai_scale.constitution import load as load_constitution
from cai_scale.critics import Critic, load_critic
from cai_scale.errors import ConfigError, MissingError
from cai_scale.evaluation import protocol
from cai_scale.evaluation.compare import Answered, compare, drift, slices
from cai_scale.methods import load_method
from cai_scale.preferences.audit import audit, require_enough
from cai_scale.preferences.pairs import build_pairs, read_pairs
from cai_scale.records import (
    Prompt,
    Response,
    canonical,
    read_json,
    write_json,
    write_jsonl,
)
from cai_scale.rollout.collect import collect, requests_for
from cai_scale.rollout.revise import RevisionRules, revise
from cai_scale.runs import ROOT, Run, check_output, open_run, versions
from cai_scale.training import models, precision
from cai_scale.training.batches import plan_batch
from cai_scale.training.logs import quiet

LIBRARIES = (
    *("cai-scale", "torch", "transformers", "trl", "peft", "accelerate", "deepspeed"),
    *("datasets", "tokenizers", "numpy"),
)
STAGES = ("collect", "train", "evaluate")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run under way on this rank, with everything that its stages need."""

    config: Config
    run: Run
    ranks: ranks.Ranks
    precision: precision.Precision
    constitution: Constitution
    critic: Critic
    prompts: Sequence[Prompt]
    heldout: Sequence[Prompt]
    ds_config: dict[str, Any] | None

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            if self.ranks.main:
                self.run.add_seconds(stage, time.monotonic() - started)

    def say(self, text: str) -> None:
        if self.ranks.main:
            print(text, flush=True)


def start(config: Config, output: Path | None, *, overwrite: bool = False) -> Job:
    """Check all that can be checked, then open the run's folder and join the other ranks.

    Raises:
        CaiError: a setting, a file or the output folder is wrong. Nothing was loaded or written.
    """
    peers = ranks.from_environment()
    constitution = load_constitution(config.constitution)
    critic = load_critic(config.critic, constitution)
    ds_config = None if config.ds_config is None else read_ds_config(config.ds_config)
    if ds_config is not None:
        _require_deepspeed()
    plan_batch(config.batch_size, config.micro_batch_size, peers.world)
    models.check(config.model)
    prompts, heldout = prompt_files.load(config.prompts), prompt_files.load(config.eval_prompts)
    if config.batch_size > len(prompts):
        raise ConfigError(
            f"--batch_size {config.batch_size} with {len(prompts)} prompts: a prompt gives one "
            f"pair at most; lower it, or bring more prompts"
        )
    if output is not None:
        check_output(output, overwrite=overwrite)
    chosen = precision.choose(config.precision)

    quiet()
    longest = max(config.max_new_tokens, protocol.DECODING.max_new_tokens)
    models.check_prompts(config.model, [*prompts, *heldout], longest)
    record: dict[str, Any] = {}
    if peers.main:  # hashing, and perhaps a download: before the ranks meet
        record = _record(config, peers, chosen, constitution, ds_config, prompts, heldout)
    ranks.join(peers, deepspeed=ds_config is not None)
    if peers.main:
        default = ROOT / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.method}"
        run, continued = open_run(output or default, record, overwrite=overwrite)
        write_json(run.constitution, constitution.data)
        path, verb = str(run.path), "continues" if continued else "starts"
    else:
        path, verb = "", ""
    path, verb = ranks.agree(peers, (path, verb))
    job = Job(
        config=config,
        run=Run(Path(path)),
        ranks=peers,
        precision=chosen,
        constitution=constitution,
        critic=critic,
        prompts=prompts,
        heldout=heldout,
        ds_config=ds_config,
    )
    device = models.device().type
    job.say(
        f"{config.method} {verb} in {path}: {peers.world} rank(s) on {device}, "
        f"{chosen.name} ({chosen.reason}), "
        + (f"DeepSpeed {config.ds_config}" if ds_config else "without DeepSpeed")
    )
    return job


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


def _record(
    config: Config,
    peers: ranks.Ranks,
    chosen: precision.Precision,
    constitution: Constitution,
    ds_config: dict[str, Any] | None,
    prompts: Sequence[Prompt],
    heldout: Sequence[Prompt],
) -> dict[str, Any]:
    """What a run was made of and where: the content of `config.json`."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "settings": config.to_dict(),
        "constitution": {"name": constitution.name, "sha256": constitution.sha256},
        "weights": models.weights_sha256(config.model),
        "prompts": {"train": _digest(prompts), "heldout": _digest(heldout)},
        "precision": {"name": chosen.name, "reason": chosen.reason},
        "ds_config": ds_config,
        "ranks": {"world": peers.world},
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cores": os.cpu_count(),
            "gpus": gpus,
        },
        "versions": {"python": platform.python_version(), **versions(*LIBRARIES)},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _digest(prompts: Sequence[Prompt]) -> str:
    lines = "\n".join(canonical(asdict(prompt)) for prompt in prompts)
    return sha256(lines.encode()).hexdigest()


def _require_deepspeed() -> None:
    try:
        importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise MissingError(
            "--ds_config needs deepspeed, which is not installed; pip install 'cai-scale[train]', "
            "or leave --ds_config out"
        ) from None
