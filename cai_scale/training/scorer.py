"""A reward model's forward pass: a causal language model, and a head on each row's last token.

transformers pools at the last token that is not `pad_token_id`, which misses the end of a text
where padding and the end share a token, and takes positions from the columns, which is wrong for
rows padded on the left. Here both come from the attention mask.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = "score"  # what transformers calls the head of every causal sequence classifier


def positions(attention_mask: Tensor) -> Tensor:
    """The place of each token in its row, counted from 0: [rows, tokens], int64.

    Args:
        attention_mask: [rows, tokens], int64; 0 marks padding, on either side.
    """
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def at_last_token(states: Tensor, attention_mask: Tensor) -> Tensor:
    """The state of each row's last token, [rows, hidden].

    Args:
        states: [rows, tokens, hidden].
        attention_mask: [rows, tokens], int64; every row has a 1.
    """
    last = attention_mask.cumsum(-1).argmax(-1)  # the first column that has seen every token
    return states[torch.arange(states.shape[0], device=states.device), last]


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
        states = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions(attention_mask),
            use_cache=False,
        ).last_hidden_state
        return {"logits": self.head(at_last_token(states, attention_mask))}
