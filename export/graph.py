"""Trace a causal language model into one ONNX graph that both prefills and decodes."""

import contextlib
import functools
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

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
    settings = OnnxConfig(dynamic=True, dynamic_shapes=_axes(sample), optimize=False)
    # torch.onnx prints its progress.
    with contextlib.redirect_stdout(io.StringIO()), windows_in_tokens():
        graph = OnnxExporter().export(model, sample, settings).program
    simplify(graph)
    return graph


def simplify(model: "onnx_ir.Model") -> None:
    """Fold what is constant and drop what is unused, in place.

    torch's own optimiser does this too, and then tries hundreds of patterns on every node, which
    takes half of the whole export; onnxruntime has its own.
    """
    from onnx_ir.passes import Sequential, common
    from onnxscript.optimizer import fold_constants

    common.InlinePass()(model)
    _lay_out_weights(model)
    fold_constants(model, should_fold=lambda node: False if node.op_type == "Transpose" else None)
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),  # the tracer's notes: stacks, with paths of files
    )(model)


def _lay_out_weights(model: "onnx_ir.Model") -> None:
    """Keep weights as the products read them, [in, out]; transposed when they are written.

    What else reads a weight keeps it as it is: an embedding, which a tied head reads transposed.
    """
    import onnx_ir

    for node in [node for node in model.graph if node.op_type == "Transpose"]:
        weight = node.inputs[0]
        if weight is None or not weight.is_initializer() or len(weight.uses()) > 1:
            continue
        tensor = weight.const_value
        if tensor is None or len(tensor.shape) != 2 or node.attributes["perm"].value == (0, 1):
            continue
        shape = onnx_ir.Shape(reversed(tensor.shape.dims))
        weight.const_value = onnx_ir.LazyTensor(
            functools.partial(_transposed, tensor), tensor.dtype, shape=shape, name=weight.name
        )
        weight.shape = shape
        node.outputs[0].replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)


def _transposed(tensor: "onnx_ir.TensorProtocol") -> "onnx_ir.Tensor":
    import onnx_ir

    return onnx_ir.Tensor(np.ascontiguousarray(tensor.numpy().T), name=tensor.name)


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
