"""A reward model's forward pass: a causal language model, and a head on each row's last token.

transformers pools at the last token that is not `pad_token_id`, which misses the end of a text
where padding and the end share a token, and takes positions from the columns, which is wrong for
rows padded on the left. Here both come from the attention mask. Training, critics and the export
all use this one pass.
"""

import contextlib
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cai_scale.training.positions import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput

HEAD = "score"  # what transformers calls the head of every causal sequence classifier


def at_last_token(states: Tensor, attention_mask: Tensor) -> Tensor:
    """The state of each row's last token, [rows, hidden].

    Args:
        states: [rows, tokens, hidden].
        attention_mask: [rows, tokens], int64; every row has a 1.
    """
    last = attention_mask.cumsum(-1).argmax(-1)  # the first column that has seen every token
    return states[torch.arange(states.shape[0], device=states.device), last]


class Head(nn.Linear):
    """A linear layer that computes in fp32, whatever the format of what it is given: scores of
    0.7 and 0.702 are one number in bf16."""

    def forward(self, states: Tensor) -> Tensor:
        kind = states.device.type
        mixed = torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if mixed else contextlib.nullcontext():
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(states.float(), self.weight.float(), bias)


class Scorer(nn.Module):
    """Scores a batch whose rows may be padded on either side, with any token.

    Args:
        model: loaded by `models.load_scorer`, adapted or merged.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.config = model.config
        self.backbone = getattr(model, model.base_model_prefix)
        self.head = getattr(model, HEAD)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """`logits`, [rows, labels].

        Args:
            input_ids: [rows, tokens], int64.
            attention_mask: [rows, tokens], int64; 0 marks padding, and every row has a 1.
        """
        return {"logits": score(self.backbone, self.head, input_ids, attention_mask)}


def score(
    backbone: nn.Module, head: nn.Module, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    """What the head makes of each row's last token that the mask shows: [rows, labels]."""
    states = backbone(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions(attention_mask),
        use_cache=False,
    ).last_hidden_state
    scores: Tensor = head(at_last_token(states, attention_mask))
    return scores


def pool_by_mask(model: "PreTrainedModel") -> "PreTrainedModel":
    """Give a sequence classifier of transformers `Scorer`'s forward pass and an fp32 head.

    The model stays what it is to peft, to a trainer, to DeepSpeed and to `save_pretrained`.
    """
    getattr(model, HEAD).__class__ = Head
    model.forward = MethodType(_forward, model)
    return model


def _forward(
    self: "PreTrainedModel", input_ids: Tensor, attention_mask: Tensor, **unused: Any
) -> "SequenceClassifierOutput":
    """`unused` is what peft and trainers pass to any model, such as `use_cache`."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    backbone, head = getattr(self, self.base_model_prefix), getattr(self, HEAD)
    return SequenceClassifierOutput(logits=score(backbone, head, input_ids, attention_mask))


def start_head(model: "PreTrainedModel", seed: int) -> None:
    """Draw a new head from N(0, 1/(d + 1)²), d the width of a state, so that the first scores are
    near 0: the same numbers on any number of ranks, sharded or not."""
    from cai_scale.training.adapters import gathered

    weight: Any = getattr(model, HEAD).weight
    outputs, width = getattr(weight, "ds_shape", weight.shape)
    drawn = torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), gathered(weight):
        weight.copy_(drawn / (width + 1))
