"""Write a reward model into the bundle: its graphs, and what their readers need."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_scale.runtime import bundle as layout
from cai_scale.training.models import load_tokenizer

from .bundle import context_length, write_config, write_tokenizer
from .fuse import fuse_scorer
from .graph import simplify
from .normalise import forget_symbols, split_gemms
from .quantise import quantise
from .reward import Source, load
from .scorer_parity import Texts, check_close, check_exact
from .variants import write

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
    place = folder / layout.REWARD
    files = write_graphs(reward.model, place)
    context = context_length(reward.model.config, tokenizer)
    write_config(place, reward.model, context)
    write_tokenizer(place, tokenizer)
    exact = Texts(reward.model, sequences[:EXACT_TEXTS])
    close = Texts(reward.model, sequences)
    return {
        "labels": list(source.labels),
        "merge": {"max_abs_delta": reward.max_delta},
        "fp32": {kind: check_exact(kind, place / f, exact) for kind, f in files["fp32"].items()},
        "q8": {kind: check_close(kind, place / f, close) for kind, f in files["q8"].items()},
    }


def write_graphs(model: "PreTrainedModel", folder: Path) -> dict[str, dict[str, str]]:
    """Write the graphs of a reward model; return their files, by variant and kind.

    A scorer reads many tokens at once, where products in integers are faster than those of
    weights in blocks.
    """
    (folder / "onnx").mkdir(parents=True)
    models = {"graph": trace_scorer(model)}
    fused = fuse_scorer(model)
    if fused is not None:
        models["fused"] = fused
    fp32 = write(folder, "fp32", models)
    quantised = quantise(list(models.values()), 8, "columns")
    return {"fp32": fp32, "q8": write(folder, "q8", dict(zip(models, quantised, strict=True)))}


def describe(parity: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says about the reward model that `export_scorer` wrote and measured."""
    return {
        "variants": {
            name: {kind: files[kind] for kind in parity[name]}
            for name, files in layout.REWARD_VARIANTS.items()
        },
        "default": "q8",
        "labels": parity["labels"],
    }


def report(parity: Mapping[str, Any]) -> str:
    """One line of what `export_scorer` measured."""
    worst = max(max(found["max_abs_delta"].values()) for found in parity["fp32"].values())
    close = parity["q8"].values()
    return (
        f"reward model: fp32 max |Δ score| {worst:.1e}; q8 Spearman "
        f"{min(found['spearman'] for found in close):.4f}, order "
        f"{min(found['order'] for found in close):.4f} over {parity['q8']['graph']['texts']} texts"
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
    settings = OnnxConfig(dynamic=True, dynamic_shapes=dict.fromkeys(sample, axes), optimize=False)
    with contextlib.redirect_stdout(io.StringIO()):  # torch.onnx prints its progress
        graph = OnnxExporter().export(Scorer(model).eval(), sample, settings).program
    simplify(graph)
    for value in [*graph.graph.inputs, *graph.graph.outputs]:
        named = zip(AXES[value.name], value.shape, strict=True)
        value.shape = onnx_ir.Shape([size if name is None else name for name, size in named])
    forget_symbols(graph)
    split_gemms(graph)
    return graph
