"""A run under way on this rank: everything is checked before its first stage begins."""

import functools
import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cai_scale import chain, critics, ranks, results
from cai_scale import prompts as prompt_files
from cai_scale.config import Config, read_ds_config
from cai_scale.constitution import Constitution
from cai_scale.constitution import load as load_constitution
from cai_scale.critics import Comparer, Critic
from cai_scale.critics import judge as judges
from cai_scale.critics.weighted import parse
from cai_scale.errors import ConfigError, MissingError
from cai_scale.evaluation import protocol
from cai_scale.records import Prompt, sha256, write_json, write_jsonl
from cai_scale.rollout import remote
from cai_scale.rollout.choose import Choice, choose
from cai_scale.runs import ROOT, Run, check_output, finished, open_run, versions
from cai_scale.training import models, precision, quantised
from cai_scale.training.batches import plan_batch
from cai_scale.training.logs import quiet

LIBRARIES = (
    *("cai-scale", "torch", "transformers", "trl", "peft", "accelerate", "deepspeed"),
    *("datasets", "tokenizers", "numpy"),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run under way on this rank, with everything that its stages need."""

    config: Config
    run: Run
    ranks: ranks.Ranks
    precision: precision.Precision
    sampler: Choice
    local: Choice  # what answers the held-out prompts: the sampler, or another than a server
    constitution: Constitution
    critic: Critic
    comparer: Comparer | None  # labels pairs, where no scores do
    evaluator: Critic  # scores the held-out answers
    start: Path | None  # the adapter or model that the first round continues from
    prompts: Sequence[Prompt]
    heldout: Sequence[Prompt]
    ds_config: dict[str, Any] | None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Take a stage's time, and record in the run's chain what it reads and writes."""
        if not self.ranks.main:
            yield
            return
        with chain.recording(self.run, name):
            started = time.monotonic()
            try:
                yield
            finally:
                self.run.add_cost(name, time.monotonic() - started, _peak_memory())

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
    for name in dict.fromkeys((config.critic, config.evaluator)):
        critics.check(name, constitution, config.model, config.judge)
    ds_config = None if config.ds_config is None else read_ds_config(config.ds_config)
    if ds_config is not None:
        _require_deepspeed()
    plan_batch(config.batch_size, config.micro_batch_size, peers.world)
    models.check(config.model)
    prompts, heldout = prompt_files.load(config.prompts), prompt_files.load(config.eval_prompts)
    if config.batch_size > (rows := len(prompts) * config.rows_of_prompt):
        raise ConfigError(
            f"--batch_size {config.batch_size} with {len(prompts)} prompts: {config.method} has "
            f"{rows} rows of these at most; lower it, or bring more prompts"
        )
    if config.qlora:
        quantised.check()
    _check_reporting(config.report_to)
    origin = None if config.start is None else _origin(Path(config.start), config)
    if output is not None:
        check_output(output, overwrite=overwrite)
    chosen = precision.choose(config.precision)
    here: dict[str, Any] = {
        "gpu": models.device().type != "cpu",
        "fusible": lambda: _fusible(config.model),
    }
    zero = 0 if ds_config is None else ds_config["zero_optimization"]["stage"]
    sampler = choose(config.sampler, live=not config.collects, stage=zero, **here)
    at_hand = config.collects and sampler.name != "openai"
    local = sampler if at_hand else choose("auto", **here)
    if sampler.name == "openai":
        later = config.rounds > 1 or config.start is not None or not config.collects
        name = config.sampler_model or config.model
        remote.check(str(config.sampler_url), name, adapters=later)

    quiet()
    longest = max(config.max_new_tokens, protocol.DECODING.max_new_tokens)
    models.check_prompts(config.model, [*prompts, *heldout], longest)
    record: dict[str, Any] = {}
    if peers.main:  # hashing, and perhaps a download: before the ranks meet
        record = _record(config, peers, chosen, sampler, constitution, ds_config, prompts, heldout)
        record["critic"] = {
            **critics.identity(config.critic, config.judge),
            **critics.identity(config.evaluator, config.judge),
        }
        record["start"] = {} if origin is None else _hashes(origin)
    ranks.join(peers, deepspeed=ds_config is not None)
    if peers.main:
        default = ROOT / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.method}"
        run, continued = open_run(output or default, record, overwrite=overwrite)
        with chain.recording(run, "start"):
            _keep(run, constitution, {"train": prompts, "heldout": heldout})
        path, verb = str(run.path), "continues" if continued else "starts"
    else:
        path, verb = "", ""
    path, verb = ranks.agree(peers, (path, verb))
    run = Run(Path(path))
    critic, comparer, evaluator = _critics(config, constitution, run, peers)
    job = Job(
        config=config,
        run=run,
        ranks=peers,
        precision=chosen,
        sampler=sampler,
        local=local,
        constitution=constitution,
        critic=critic,
        comparer=comparer,
        evaluator=evaluator,
        start=origin,
        prompts=prompts,
        heldout=heldout,
        ds_config=ds_config,
    )
    job.say(
        f"{config.method} {verb} in {path}: {peers.world} rank(s) on {models.device().type}, "
        f"{chosen.name} ({chosen.reason}), answers by {sampler.name} ({sampler.reason}), "
        + (f"DeepSpeed {config.ds_config}" if ds_config else "without DeepSpeed")
    )
    return job


def _peak_memory() -> int:
    """The most that this process has held so far, in bytes: of a GPU's memory where it has one."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def _check_reporting(names: Sequence[str]) -> None:
    """Complain about a logger of `--report_to` that transformers does not know or cannot find."""
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    available = integration_utils.get_available_reporting_integrations()
    for name in set(names) - {"none", "all"}:
        if name not in known:
            raise ConfigError(
                f"unknown --report_to {name!r}; choose of: {', '.join(sorted(known))}"
            )
        if name not in available:
            raise MissingError(f"--report_to {name} needs its library, which is not installed")


def _critics(
    config: Config, constitution: Constitution, run: Run, peers: ranks.Ranks
) -> tuple[Critic, Comparer | None, Critic]:
    """What scores answers, what labels pairs in its place, and what scores held-out answers."""
    judge = scoring = None
    if config.judged:
        settings = config.judge
        # Every rank asks about its share of a step's answers, or of a guard's.
        if config.guard_steps or not config.collects:
            settings = settings.shared(peers.world)
        journal = run.labels(peers.rank)
        judge = judges.load(constitution, settings, journal=journal, shown=peers.main)
        scoring, alone = judge, replace(config.judge, mode="absolute", principles="all")
        if alone != settings and "judge" in dict(parse(config.evaluator)):
            scoring = judges.load(constitution, alone, journal=journal, shown=peers.main)
    load = functools.partial(
        critics.load_critic, constitution=constitution, agreement=config.min_agreement
    )
    critic = load(config.critic, judge=judge)
    evaluator = results.evaluator(config, run, constitution, load(config.evaluator, judge=scoring))
    return critic, judge if config.labels_pairs else None, evaluator


def _keep(run: Run, constitution: Constitution, asked: Mapping[str, Sequence[Prompt]]) -> None:
    """Copy what the run starts from into it; a run that continues has it already."""
    run.remove_policies()  # of a start that was killed; the other ranks have not begun
    if not run.constitution.is_file():
        write_json(run.constitution, constitution.data)
    for kind, prompts in asked.items():
        if not run.prompts(kind).is_file():
            write_jsonl(run.prompts(kind), prompts)


def _origin(path: Path, config: Config) -> Path:
    """What a finished run trained, for another training to continue from.

    Raises:
        CaiError: the run is not finished, or is of another model or kind.
    """
    run = finished(path)
    model, product = run.settings()["model"], run.product
    if model != config.model or run.settings()["method"] == "reward":
        raise ConfigError(
            f"--start {path}: a run of {run.settings()['method']} on {model}; name one that "
            f"trained {config.model} to answer"
        )
    if product is None or models.is_adapter(product) != config.lora:
        raise ConfigError(
            f"--start {path}: what it trained is not {'an adapter' if config.lora else 'a model'}; "
            f"give --{'no-' if config.lora else ''}lora as that run did"
        )
    return product


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}


def _record(
    config: Config,
    peers: ranks.Ranks,
    chosen: precision.Precision,
    sampler: Choice,
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
        "prompts": {"train": prompt_files.digest(prompts), "heldout": prompt_files.digest(heldout)},
        "precision": {"name": chosen.name, "reason": chosen.reason},
        "sampler": {"name": sampler.name, "reason": sampler.reason},
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


def _fusible(model: str) -> bool:
    from cai_export.policy import fusible

    return fusible(model)


def _require_deepspeed() -> None:
    try:
        importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise MissingError(
            "--ds_config needs deepspeed, which is not installed; pip install 'cai-scale[train]', "
            "or leave --ds_config out"
        ) from None
