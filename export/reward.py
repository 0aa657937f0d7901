"""Find a reward model, check it before it is loaded, and merge its adapter with its head kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_scale import constitution as constitutions
from cai_scale import runs
from cai_scale.constitution import Constitution
from cai_scale.errors import ConfigError, GateError, IntegrityError, MissingError
from cai_scale.records import read_json
from cai_scale.training import adapters, models

from .merge import MAX_DELTA, check_run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OVERALL = ("overall",)
HEAD_WEIGHT = "score.weight"
ADAPTED_HEAD = f"base_model.model.{HEAD_WEIGHT}"  # its name in an adapter's file

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Source:
    """Where a reward model lies, and what its outputs are called.

    `model` is a folder or name that transformers loads; `adapter` lies on top of it, with the
    head, or is None where `model` is whole.
    """

    path: Path
    model: str
    adapter: Path | None
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Reward:
    """A reward model in fp32 without adapter, its tokenizer, and how far its scores moved by
    merging; 0 where there was nothing to merge."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    labels: tuple[str, ...]
    max_delta: float


def find(path: Path, constitution: Constitution) -> Source:
    """Check a run of a reward model, or a folder that save_pretrained wrote, without loading it.

    Args:
        constitution: the bundle's, whose principles the scores are about.

    Raises:
        CaiError: it is neither, or it has no score head, or its labels are not "overall" alone or
            the constitution's principles.
    """
    if not (path / "config.json").is_file():
        raise MissingError(
            f"{path} holds no reward model: it has no config.json; name a run of a reward model, "
            f"or a folder that save_pretrained wrote"
        )
    config = read_json(path / "config.json")
    if "settings" in config:
        return _in_run(path, constitution)
    return _in_folder(path, config, constitution)


def load(source: Source, sequences: Sequence[Sequence[int]]) -> Reward:
    """Load a reward model in fp32 and merge its adapter.

    Args:
        sequences: token ids that must score as they did with the adapter.

    Raises:
        GateError: the merged head is not the trained one, or a score moved by more than
            `MAX_DELTA`.
    """
    import torch

    tokenizer = models.load_tokenizer(source.model)
    whole = source.adapter is None
    model = models.load_scorer(source.model, torch.float32, source.labels, new_head=not whole).cpu()
    if source.adapter is None:
        return Reward(model, tokenizer, source.labels, 0.0)
    adapted = models.with_adapter(model, source.adapter)
    before = scores(adapted.base_model.model, sequences)
    merged = adapted.merge_and_unload(safe_merge=True).eval()
    check_head(merged, source.adapter)
    delta = float((before - scores(merged, sequences)).abs().max())
    if not delta <= MAX_DELTA:  # so that a NaN fails
        raise GateError(
            f"merging moved a reward by {delta:.2e}, over {MAX_DELTA:.0e}; train again in fp32"
        )
    return Reward(merged, tokenizer, source.labels, delta)


def check_head(merged: "PreTrainedModel", adapter: Path) -> None:
    """Compare the merged model's head with the one in the adapter's file, bit for bit.

    Raises:
        GateError: it was lost, or replaced by another.
    """
    import torch
    from safetensors import safe_open

    with safe_open(adapter / adapters.WEIGHTS, framework="pt") as file:
        trained = file.get_tensor(ADAPTED_HEAD)
    if not torch.equal(merged.score.weight.detach(), trained.float()):
        raise GateError(f"the score head of {adapter} did not survive the merge; no bundle")


def scores(model: "PreTrainedModel", sequences: Sequence[Sequence[int]]) -> "torch.Tensor":
    """The torch model's scores of sequences, each by itself: [sequences, labels], float32."""
    import torch

    from cai_scale.training.scorer import Scorer

    scorer = Scorer(model)
    with torch.inference_mode():
        rows = [torch.tensor([list(sequence)]) for sequence in sequences]
        return torch.cat([scorer(row, torch.ones_like(row))["logits"] for row in rows]).float()


def _in_run(path: Path, constitution: Constitution) -> Source:
    run = runs.finished(path)
    check_run(run)
    trained = constitutions.from_dict(read_json(run.constitution), str(run.constitution))
    if trained.sha256 != constitution.sha256:
        raise ConfigError(
            f"reward model {path} was trained towards another constitution ({trained.name}) than "
            f"the bundle's ({constitution.name}); name a reward model of the same"
        )
    task = read_json(run.adapter / adapters.CONFIG).get("task_type")
    if task != "SEQ_CLS":
        raise ConfigError(
            f"{run.adapter} is an adapter for {task!r}, a reward model's is for 'SEQ_CLS'; name a "
            f"run of a reward model"
        )
    outputs = _outputs(run.adapter, _shapes(run.adapter / adapters.WEIGHTS), ADAPTED_HEAD)
    principles = tuple(principle.id for principle in trained.principles)
    labels = OVERALL if outputs == 1 else principles
    _check_outputs(run.adapter, outputs, labels)
    return Source(path, run.settings()["model"], run.adapter, labels)


def _in_folder(path: Path, config: Mapping[str, Any], constitution: Constitution) -> Source:
    models.check(str(path))
    if "auto_map" in config:
        raise ConfigError(
            f"reward model {path} needs code of its own (auto_map), which is never run; save it "
            f"as an architecture of transformers"
        )
    kind = str((config.get("architectures") or [None])[0])
    if not kind.endswith("ForSequenceClassification"):
        raise ConfigError(
            f"{path} is a {kind}, a reward model is a ...ForSequenceClassification; name another"
        )
    labels = _labels(path, config, constitution)
    shapes = {k: s for file in path.glob("*.safetensors") for k, s in _shapes(file).items()}
    _check_outputs(path, _outputs(path, shapes, HEAD_WEIGHT), labels)
    return Source(path, str(path), None, labels)


def _labels(path: Path, config: Mapping[str, Any], constitution: Constitution) -> tuple[str, ...]:
    named = config.get("id2label")
    named = named if isinstance(named, dict) else {}
    labels = tuple(str(named.get(str(index))) for index in range(len(named)))
    principles = [principle.id for principle in constitution.principles]
    if labels != OVERALL and sorted(labels) != sorted(principles):
        raise ConfigError(
            f"{path}/config.json: id2label: {', '.join(labels) or 'nothing'}: expected overall, or "
            f"the constitution's principles: {', '.join(principles)}"
        )
    return labels


def _outputs(path: Path, shapes: Shapes, head: str) -> int:
    if head not in shapes:
        raise IntegrityError(
            f"{path} has no score head ({head}); train it with modules_to_save=['score']"
        )
    return shapes[head][0]


def _check_outputs(path: Path, outputs: int, labels: Sequence[str]) -> None:
    if outputs != len(labels):
        raise IntegrityError(
            f"the score head of {path} has {outputs} outputs, expected one, or one for each of "
            f"{', '.join(labels)}; train it again"
        )


def _shapes(file: Path) -> dict[str, list[int]]:
    """The shapes in a safetensors file, from its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as content:
            return {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{file} is no safetensors file ({error}); restore it") from None
