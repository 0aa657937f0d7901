"""Load a reward model as it is exported: its adapter merged, its head kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cai_scale.errors import GateError
from cai_scale.training import adapters, models, rewards
from cai_scale.training.rewards import ADAPTED_HEAD, Source

from .merge import MAX_DELTA

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Reward:
    """A reward model in fp32 without adapter, its tokenizer, and how far its scores moved by
    merging; 0 where there was nothing to merge."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    labels: tuple[str, ...]
    max_delta: float


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
    adapted = rewards.load(source, torch.float32).cpu()
    if source.adapter is None:
        return Reward(adapted, tokenizer, source.labels, 0.0)
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
