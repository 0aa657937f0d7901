"""A run's trained model: its LoRA adapter merged, with a check that nothing was lost, or the
whole model that it trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_scale.errors import GateError
from cai_scale.runs import Run
from cai_scale.training import models
from cai_scale.training.adapters import check_adapter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_DELTA = 1e-3  # of a logit, adapted against merged, in fp32


@dataclass(frozen=True)
class Merged:
    """A merged model in fp32, its tokenizer, and how far its logits moved by merging, if that
    was measured."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    max_delta: float | None


def check_run(run: Run) -> None:
    """Complain about a run that cannot be exported, before a model is loaded.

    Raises:
        CaiError: what it trained is missing or corrupt, or the base model is not the trained one's.
    """
    if run.model.is_dir():
        models.check(str(run.model))
    else:
        check_adapter(run.adapter)
    models.check_weights(run.settings()["model"], run.record["weights"], run.path)


def merged_policy(model: str, product: Path | None) -> Merged:
    """A model in fp32 with what a training made of it, merged; nothing is compared."""
    import torch

    with models.whole():  # one rank exports alone, while ZeRO-3 may shard what is trained
        loaded: Any = models.load_trained(model, product, torch.float32).cpu()
    if product is not None and models.is_adapter(product):
        loaded = loaded.merge_and_unload(safe_merge=True).eval()
    return Merged(loaded, models.load_tokenizer(model), None)


def merge(run: Run, sequences: Sequence[Sequence[int]]) -> Merged:
    """Load base and adapter in fp32 and merge, or load the whole model that was trained.

    Args:
        sequences: token ids on which the model must answer as it did with its adapter.

    Raises:
        GateError: a logit moved by more than `MAX_DELTA`.
    """
    import torch

    name = run.settings()["model"]
    if run.model.is_dir():
        return merged_policy(name, run.model)
    adapted = models.with_adapter(models.load_model(name, torch.float32).cpu(), run.adapter)
    before = [_logits(adapted, sequence) for sequence in sequences]
    merged = adapted.merge_and_unload(safe_merge=True).eval()
    for parameter in merged.parameters():  # lets go of the base model's file, mapped into memory
        parameter.data = parameter.data.clone()
    deltas = [
        (old - _logits(merged, sequence)).abs().max()
        for old, sequence in zip(before, sequences, strict=True)
    ]
    delta = float(torch.stack(deltas).max())
    if not delta <= MAX_DELTA:  # so that a NaN fails
        raise GateError(
            f"merging moved a logit by {delta:.2e}, over {MAX_DELTA:.0e}; train again in fp32"
        )
    return Merged(merged, models.load_tokenizer(name), delta)


def _logits(model: "PreTrainedModel", sequence: Sequence[int]) -> "torch.Tensor":
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(sequence)])).logits[0]
