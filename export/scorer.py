"""Write a reward model into the bundle: its graphs, and what their readers need."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_scale.runtime import bundle as layout
from cai_scale.training.models import load_tokenizer
from cai_scale.training.rewards import Source

from . import weights
from .bundle import context_length, write_config, write_tokenizer
from .normalise import forget_symbols, split_gemms
from .quantise import quantise
from .reward import load
from .scorer_parity import check_close, check_exact

if TYPE_CHECKING:
    import onnx_ir
    from transformers import PreTrainedModel

EXACT_TEXTS, CLOSE_TEXTS = 12, 128
AXES = {
    "input_ids": ("batch_size", "sequence_length"),
    "attention_mask": ("batch_size", "sequence_length"),
    "logits": ("batch_size", None),
}


def export_scorer(
    source: Source, conversations: Sequence[Sequence[dict[str, str]]], folder: Path
) -> dict[str, Any]:
    """Write `reward/` into a bundle's folder, and return how its graphs compare with torch.

    Args:
        conversations: each ends with an answer; the graphs are compared on the first `CLOSE_TEXTS`.

    Raises:
        CaiError: the reward model cannot be loaded, or a gate does not hold.
    """
    tokenizer = load_tokenizer(source.model)
    sequences = [
        list(tokenizer.apply_chat_template(list(messages), return_dict=True)["input_ids"])
        for messages in conversations[:CLOSE_TEXTS]
    ]
    reward = load(source, sequences[:EXACT_TEXTS])
    graph = trace_scorer(reward.model)
    fp32, q8 = (folder / layout.REWARD_VARIANTS[name]["graph"] for name in ("fp32", "q8"))
    fp32.parent.mkdir(parents=True)
    weights.save({fp32: graph})
    weights.save(dict(zip([q8], quantise([graph], 8), strict=True)))
    context = context_length(reward.model.config, tokenizer)
    write_config(folder / layout.REWARD, reward.model, context)
    write_tokenizer(folder / layout.REWARD, tokenizer)
    return {
        "labels": list(source.labels),
        "merge": {"max_abs_delta": reward.max_delta},
        "fp32": check_exact(fp32, reward.model, sequences[:EXACT_TEXTS]),
        "q8": check_close(q8, reward.model, sequences),
    }


def describe(source: Source) -> dict[str, Any]:
    """What the manifest says about the bundle's reward model."""
    return {
        "variants": layout.REWARD_VARIANTS,
        "default": "q8",
        "labels": list(source.labels),
    }


def report(parity: Mapping[str, Any]) -> str:
    """One line of what `export_scorer` measured."""
    worst = max(parity["fp32"]["max_abs_delta"].values())
    close = parity["q8"]
    return (
        f"reward model: fp32 max |Δ score| {worst:.1e}; q8 Spearman {close['spearman']:.4f}, order "
        f"{close['order']:.4f} over {close['texts']} texts"
    )


def trace_scorer(model: "PreTrainedModel") -> "onnx_ir.Model":
    """The graph of a reward model: `input_ids`, `attention_mask` → `logits` [batch_size, labels].

    Positions and the token that is scored follow from the mask inside the graph.
    """
    import onnx_ir
    import torch
    from transformers.exporters import OnnxConfig, OnnxExporter

    from cai_scale.training.scorer import Scorer

    # Any tokens do; two rows and several tokens, so that no axis is taken for a constant.
    tokens = torch.arange(16).reshape(2, 8) % model.config.vocab_size
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    axes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    sample = {"input_ids": tokens, "attention_mask": mask}
    settings = OnnxConfig(dynamic=True, dynamic_shapes=dict.fromkeys(sample, axes))
    with contextlib.redirect_stdout(io.StringIO()):  # torch.onnx prints its progress
        graph = OnnxExporter().export(Scorer(model).eval(), sample, settings).program
    for value in [*graph.graph.inputs, *graph.graph.outputs]:
        named = zip(AXES[value.name], value.shape, strict=True)
        value.shape = onnx_ir.Shape([size if name is None else name for name, size in named])
    forget_symbols(graph)
    split_gemms(graph)
    return graph
