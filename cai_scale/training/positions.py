"""Positions of rows that are padded on the left, as a sampler counts them."""

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return args, kwargs
