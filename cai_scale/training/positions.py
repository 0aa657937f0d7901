"""Positions of tokens in rows that are padded on either side."""

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def positions(attention_mask: "Tensor") -> "Tensor":
    """The place of each token in its row, counted from 0: [rows, tokens], int64.

    Args:
        attention_mask: [rows, tokens], int64; 0 marks padding, on either side.
    """
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def count_from_the_mask(model: "PreTrainedModel") -> None:
    """Give every forward pass that brings no positions those of its attention mask, from the
    first real token on.

    `generate` brings them. TRL's GRPO does not, and a model with learned positions, such as
    GPT-2, would take padding for text.
    """
    backbone: Any = model.base_model
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        backbone.register_forward_pre_hook(_positions, with_kwargs=True)


def _positions(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    mask = kwargs.get("attention_mask")
    if mask is not None and kwargs.get("position_ids") is None:
        kwargs["position_ids"] = positions(mask)
    return args, kwargs
