"""Trace a causal language model into one ONNX graph that both prefills and decodes."""

import contextlib
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir
    from transformers import PreTrainedModel


def trace(model: "PreTrainedModel") -> "onnx_ir.Model":
    """The graph of `model`, with the names of transformers' exporter; see `normalise`.

    The exporter's multi-token decode graph serves both purposes: an empty cache makes it a
    prefill.
    """
    import torch
    from transformers.exporters import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_prefill_decode

    # Any tokens do; two rows and several tokens, so that no axis is taken for a constant.
    tokens = torch.arange(16).reshape(2, 8) % model.config.vocab_size
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with contextlib.redirect_stdout(io.StringIO()):  # torch.onnx prints its progress
        parts = decompose_prefill_decode(
            model, {"input_ids": tokens, "attention_mask": mask}, multi_token_decode=True
        )
        decoder, sample = parts["decode"]
        settings = OnnxConfig(dynamic=True, dynamic_shapes=_axes(sample))
        return OnnxExporter().export(decoder, sample, settings).program


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
