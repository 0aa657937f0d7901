"""The fused graph: the same model by onnxruntime-genai's builder, with attention as one node.

It is faster, and right only for rows padded on the right (GroupQueryAttention counts a row's
tokens from its mask's sum), so it lies beside the contract graph and never replaces it.
"""

import contextlib
import copy
import io
from typing import TYPE_CHECKING, Any

from cai_scale.runtime.graph import KEPT

if TYPE_CHECKING:
    import onnx_ir
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

# The builder's class for each architecture whose fused graph was seen to answer as torch does.
BUILDERS = {
    "LlamaForCausalLM": "LlamaModel",
    "MistralForCausalLM": "MistralModel",
    "Qwen2ForCausalLM": "QwenModel",
    "Qwen3ForCausalLM": "Qwen3Model",
}
ATTENTION = "GroupQueryAttention"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.MatMul.weight"


def knows(config: "PretrainedConfig") -> bool:
    """Whether there is a fused graph for a model.

    Not with a sliding window, which the builder counts otherwise than transformers, nor with
    scaled rotary positions: both would show only in texts longer than those of the parity gate.
    """
    rotary = getattr(config, "rope_parameters", None) or {}
    return (
        any(name in BUILDERS for name in config.architectures or ())
        and getattr(config, "sliding_window", None) is None
        and rotary.get("rope_type", "default") == "default"
    )


def fuse(model: "PreTrainedModel") -> "onnx_ir.Model | None":
    """The fused graph of `model`, in fp32, its weights still those in memory.

    None where there is none: see `knows`, and the builder may refuse a setting.
    """
    built = _build(model)
    if built is None:
        return None
    if model.config.tie_word_embeddings:
        _tie(built.graph)
    _keep_some_logits(built.graph)
    return built


def fuse_scorer(model: "PreTrainedModel") -> "onnx_ir.Model | None":
    """The fused graph of a reward model, with the names of its contract graph; None as of `fuse`.

    Nothing is cached, and what follows the last layer's attention is worked out for each row's
    last token alone.
    """
    built = _build(model, exclude_lm_head=True)
    if built is None:
        return None
    _drop_cache(built.graph)
    _score_last(built.graph, model.config.num_hidden_layers - 1, model.score.weight.detach())
    return built


def _build(model: "PreTrainedModel", **options: bool) -> "onnx_ir.Model | None":
    """What the builder makes of a model, by the class of its language model."""
    import onnx_ir

    config = copy.deepcopy(model.config)  # the builder writes into it
    language_model = type(model).__name__.replace("ForSequenceClassification", "ForCausalLM")
    config.architectures = [language_model]
    if not knows(config):
        return None
    # The builder's modules import each other by way of this one.
    import onnxruntime_genai.models  # noqa: F401
    from onnxruntime_genai.models import builders

    made = getattr(builders, BUILDERS[language_model])
    fp32 = onnx_ir.DataType.FLOAT
    # Queries, keys and values apart, so that the contract graph has the same weights.
    options = {"disable_qkv_fusion": True, **options}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        try:
            builder = made(config, fp32, fp32, "cpu", "", options)
            builder.load_weights = lambda _: model  # instead of reading them from a folder
            builder.make_model("")
        except NotImplementedError:
            return None
    built: onnx_ir.Model = builder.model
    built.graph.sort()
    _leave_out_unnamed(built.graph)
    _fix_axes(built.graph, builder.head_size)
    return built


def _leave_out_unnamed(graph: "onnx_ir.Graph") -> None:
    """The builder marks an input that is left out by a value without a name; onnx_ir by None."""
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is not None and not value.name:
                node.replace_input_with(index, None)


def _tie(graph: "onnx_ir.Graph") -> None:
    """Let the head read the embedding transposed, as in the contract graph."""
    import onnx_ir

    embedding, head = graph.initializers[EMBEDDING], graph.initializers[HEAD]
    transpose = onnx_ir.node("Transpose", [embedding], {"perm": [1, 0]}, name="/lm_head/Transpose")
    graph.insert_before(next(iter(head.uses())).node, transpose)
    head.replace_all_uses_with(transpose.outputs[0])
    del graph.initializers[HEAD]


def _keep_some_logits(graph: "onnx_ir.Graph") -> None:
    """Let an input say for which of the new tokens logits are wanted: when a prompt is read, none
    are, and the head is a fifth of a small model's work."""
    import onnx_ir

    head = next(value for value in graph.outputs if value.name == "logits").producer()
    kept = onnx_ir.val(KEPT, onnx_ir.DataType.INT64, ["kept_length"])
    graph.inputs.append(kept)
    gather = onnx_ir.node("Gather", [head.inputs[0], kept], {"axis": 1}, name="/lm_head/Kept")
    graph.insert_before(head, gather)
    head.replace_input_with(0, gather.outputs[0])
    graph.outputs[0].shape = onnx_ir.Shape(["batch_size", "kept_length", graph.outputs[0].shape[2]])


def _fix_axes(graph: "onnx_ir.Graph", head_size: int) -> None:
    """The builder leaves the last axis of the cache open; here it is the size of a head."""
    import onnx_ir

    for value in [*graph.inputs, *graph.outputs]:
        if (value.name or "").startswith(("past_key_values.", "present.")):
            axes: list[Any] = list(value.shape or ())
            value.shape = onnx_ir.Shape([*axes[:-1], head_size])


def _drop_cache(graph: "onnx_ir.Graph") -> None:
    """Read every row from its beginning, and keep nothing of it."""
    for node in graph:
        if node.op_type == ATTENTION:
            for past, present in zip(node.inputs[3:5], node.outputs[1:3], strict=True):
                graph.inputs.remove(past)
                graph.outputs.remove(present)
            node.replace_input_with(3, None)
            node.replace_input_with(4, None)
            node.resize_outputs(1)


def _score_last(graph: "onnx_ir.Graph", layer: int, head: "torch.Tensor") -> None:
    """Keep each row's last token alone after the attention of the last layer, and score it."""
    import onnx_ir

    nodes = {node.name: node for node in graph}
    last = nodes["/model/attn_mask_reformat/attn_mask_subgraph/Sub"]  # [rows]
    attention = nodes[f"/model/layers.{layer}/attn/{ATTENTION}"]
    norm = nodes[f"/model/layers.{layer}/post_attention_layernorm/SkipLayerNorm"]
    # The subtracted constant [1] happens to be the axis, too.
    column = onnx_ir.node("Unsqueeze", [last.outputs[0], last.inputs[1]], name="/score/Column")
    graph.insert_after(last, column)
    (projection,) = attention.outputs[0].uses()
    for node, states in ((projection.node, attention.outputs[0]), (norm, norm.inputs[0])):
        inputs, name = [states, column.outputs[0]], f"{node.name}/Last"
        gather = onnx_ir.node("GatherND", inputs, {"batch_dims": 1}, name=name)
        graph.insert_before(node, gather)
        node.replace_input_with(0, gather.outputs[0])
    for node in graph:
        for value in node.outputs:
            value.shape = None  # the builder's, with a token axis
    states = graph.outputs.pop()
    weight = onnx_ir.val("score.weight", const_value=onnx_ir.tensor(head.T.contiguous()))
    graph.register_initializer(weight)
    score = onnx_ir.node("MatMul", [states, weight], name="/score/MatMul")
    graph.append(score)
    score.outputs[0].name = "logits"
    score.outputs[0].type = states.type
    score.outputs[0].shape = onnx_ir.Shape(["batch_size", head.shape[0]])
    graph.outputs.append(score.outputs[0])
