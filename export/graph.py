"""Trace a causal language model into one ONNX graph that both prefills and decodes."""

import contextlib
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .windows import windows_in_tokens

if TYPE_CHECKING:
    import onnx_ir
    from transformers import PreTrainedModel


def trace(model: "PreTrainedModel") -> "onnx_ir.Model":
    """The graph of `model`, with the names of transformers' exporter; see `normalise`.

    A step of several tokens after others serves both purposes: an empty cache makes it a prefill.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    sample = _sample(model)
    settings = OnnxConfig(dynamic=True, dynamic_shapes=_axes(sample))
    # torch.onnx prints its progress.
    with contextlib.redirect_stdout(io.StringIO()), windows_in_tokens():
        return OnnxExporter().export(model, sample, settings).program


def _sample(model: "PreTrainedModel") -> dict[str, Any]:
    """Inputs of a step that follows others: two rows, one padded, and several tokens each, so
    that no axis is taken for a constant.

    The cache grows in every layer; the layers of a sliding window mask what they must not see.
    """
    import torch
    from transformers import DynamicCache

    tokens = torch.arange(16).reshape(2, 8) % model.config.vocab_size  # any do
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clip(min=0)
    cache = DynamicCache()
    past, new = slice(None, 5), slice(5, None)
    with torch.no_grad():
        model(
            input_ids=tokens[:, past],
            attention_mask=mask[:, past],
            position_ids=positions[:, past],
            past_key_values=cache,
        )
    return {
        "input_ids": tokens[:, new],
        "attention_mask": mask,
        "position_ids": positions[:, new],
        "past_key_values": cache,
    }


def _axes(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The axes that vary: rows and tokens, of the inputs and of every tensor in the cache."""
    import torch

    auto = torch.export.Dim.AUTO
    axes: dict[str, Any] = {
        name: {0: auto, 1: auto} for name, value in sample.items() if torch.is_tensor(value)
    }
    cache = sample["past_key_values"]
    axes["past_key_values"] = [{0: auto, 2: auto}] * (2 * len(cache))
    return axes
