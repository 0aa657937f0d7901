"""Find a reward model, and check it before it is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_scale import constitution as constitutions
from cai_scale import runs
from cai_scale.constitution import Constitution
from cai_scale.errors import ConfigError, IntegrityError, MissingError
from cai_scale.records import read_json
from cai_scale.runs import Run
from cai_scale.training import adapters, models

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

OVERALL = ("overall",)
HEAD_WEIGHT = "score.weight"
ADAPTED_HEAD = f"base_model.model.{HEAD_WEIGHT}"  # its name in an adapter's file

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Source:
    """Where a reward model lies, what its outputs are called, and what it was trained to.

    `model` is a folder or name that transformers loads; `adapter` lies on top of it, with the
    head, or is None where `model` is whole.
    """

    path: Path
    model: str
    adapter: Path | None
    labels: tuple[str, ...]
    objective: str = "regression"

    @property
    def files(self) -> Path:
        """The folder of what makes this reward model another one than its base model."""
        return self.adapter or Path(self.model)


def find(path: Path, constitution: Constitution) -> Source:
    """Check a run of a reward model, or a folder that save_pretrained wrote, without loading it.

    Args:
        constitution: whose principles the scores must be about.

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
        return of_run(runs.finished(path), constitution)
    return _in_folder(path, config, constitution)


def labels_of(outputs: str, constitution: Constitution) -> tuple[str, ...]:
    """What the head scores by the setting `reward_outputs`: "overall", or each principle."""
    return OVERALL if outputs == "overall" else tuple(p.id for p in constitution.principles)


def load(source: Source, dtype: "torch.dtype") -> "PreTrainedModel":
    """The reward model in evaluation mode, its adapter on top and not merged."""
    whole = source.adapter is None
    model = models.load_scorer(
        source.model, dtype, source.labels, new_head=not whole, objective=source.objective
    )
    return model if source.adapter is None else models.with_adapter(model, source.adapter)


def of_run(run: Run, constitution: Constitution) -> Source:
    """The reward model that a run has trained; the run need not be finished. Raises as `find`."""
    trained = constitutions.from_dict(read_json(run.constitution), str(run.constitution))
    if trained.sha256 != constitution.sha256:
        raise ConfigError(
            f"reward model {run.path} was trained towards another constitution ({trained.name}) "
            f"than this one ({constitution.name}); name a reward model of the same"
        )
    settings = run.settings()
    objective = str(settings.get("objective", "regression"))
    if run.product == run.model:
        return _in_folder(run.model, read_json(run.model / "config.json"), constitution)
    adapters.check_adapter(run.adapter)
    models.check_weights(settings["model"], run.record["weights"], run.path)
    task = read_json(run.adapter / adapters.CONFIG).get("task_type")
    if task != "SEQ_CLS":
        raise ConfigError(
            f"{run.adapter} is an adapter for {task!r}, a reward model's is for 'SEQ_CLS'; name a "
            f"run of a reward model"
        )
    outputs = _outputs(run.adapter, _shapes(run.adapter / adapters.WEIGHTS), ADAPTED_HEAD)
    labels = OVERALL if outputs == 1 else labels_of("principles", trained)
    _check_outputs(run.adapter, outputs, labels)
    return Source(run.path, settings["model"], run.adapter, labels, objective)


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
    return Source(path, str(path), None, labels, str(config.get("objective", "regression")))


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
