"""Every architecture that the stack trains: traced, quantised, and equal to torch."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cai_export import weights
from cai_export.bundle import context_length
from cai_export.fuse import fuse
from cai_export.genai import genai_config
from cai_export.graph import trace
from cai_export.normalise import normalise
from cai_export.parity import Reference, check_exact, measure
from cai_export.quantise import quantise

from cai_scale.errors import ConfigError, GateError
from cai_scale.runtime.graph import FusedGraph, Graph
from cai_scale.training.models import load_model, load_tokenizer
from tiny import save_tiny_gemma, save_tiny_gpt2, save_tiny_llama, save_tiny_qwen

# Longer than the window of the Gemmas, and of different lengths.
SEQUENCES = [list(range(5 + 40 * i, 80 + 47 * i)) for i in range(1, 8)] * 4


@dataclass(frozen=True)
class Shape:
    """How a tiny model is made, and what its graph must hold."""

    save: Callable[[Path], Path]
    heads: int  # of keys and values
    size: int  # of a head
    products: int  # weights at 8 bits, the head among them
    fused: bool = True


SHAPES = {
    "llama": Shape(save_tiny_llama, heads=2, size=16, products=15),
    "gpt2": Shape(save_tiny_gpt2, heads=4, size=16, products=9, fused=False),
    "qwen2": Shape(lambda f: save_tiny_qwen(f, version=2), heads=2, size=16, products=15),
    "qwen3": Shape(lambda f: save_tiny_qwen(f, version=3), heads=2, size=32, products=15),
    "gemma2": Shape(lambda f: save_tiny_gemma(f, version=2), 2, 32, products=15, fused=False),
    "gemma3": Shape(lambda f: save_tiny_gemma(f, version=3), 2, 32, products=15, fused=False),
}


@dataclass(frozen=True)
class Exported:
    """A model folder, the model in fp32, what it says, its graphs, and the one at 8 bits."""

    folder: Path
    model: Any
    reference: Reference
    graph: Path
    fused: Path | None
    quantised: Path


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def exported(shape: str, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = SHAPES[shape].save(tmp_path_factory.mktemp(shape) / "model")
    model = load_model(str(folder), torch.float32)
    graphs = folder.parent / "onnx"
    graphs.mkdir()
    paths = [graphs / name for name in ("model.onnx", "fused.onnx")]
    fused = fuse(model)
    models = [normalise(trace(model)), *([] if fused is None else [fused])]
    weights.save(dict(zip(paths, models, strict=False)))
    quantised = graphs / "model_quantized.onnx"
    weights.save(dict(zip([quantised], quantise(models[:1], 8, accuracy_level=0), strict=True)))
    (graphs.parent / "said").mkdir()
    reference = Reference(graphs.parent / "said", model, SEQUENCES)
    return Exported(folder, model, reference, paths[0], paths[1] if fused else None, quantised)


@pytest.mark.slow
def test_an_exported_architecture_answers_as_torch_does(exported: Exported, shape: str) -> None:
    exact = measure(Graph(exported.graph), exported.reference)
    check_exact("fp32", exact)
    assert 0 < worst(exact) <= 2e-5
    assert exact["max_abs_logit_delta"].keys() == {"alone", "left", "right"}
    assert (exported.fused is not None) is SHAPES[shape].fused
    if exported.fused is not None:
        assert worst(measure(FusedGraph(exported.fused), exported.reference)) <= 2e-5
    close = measure(Graph(exported.quantised), exported.reference)
    assert 0 < close["kl"] <= 0.001
    assert close["alone_against_batch"] <= 1e-5

    nodes = onnx.load(str(exported.quantised), load_external_data=False).graph.node
    kinds = Counter(node.op_type for node in nodes)
    assert kinds["MatMulNBits"] == SHAPES[shape].products
    assert kinds["GatherBlockQuantized"] == 1
    assert kinds["Gemm"] == 0
    shapes = {tuple(v.shape[1::2]) for v in caches(exported.graph)}
    assert shapes == {(SHAPES[shape].heads, SHAPES[shape].size)}


@pytest.mark.slow
def test_a_moved_weight_closes_the_gate(exported: Exported, tmp_path: Path) -> None:
    """The control: the model is no longer the one that was traced."""
    weight = next(p for p in reversed(list(exported.model.parameters())) if p.dim() == 2)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        moved = Reference(tmp_path, exported.model, SEQUENCES)
        weight.copy_(kept)
    for path, kind in ((exported.graph, Graph), (exported.fused, FusedGraph)):
        if path is not None:
            with pytest.raises(GateError, match="differs from torch"):
                check_exact("fp32", measure(kind(path), moved))


def worst(figures: dict[str, Any]) -> float:
    return max(d for modes in figures["max_abs_logit_delta"].values() for d in modes.values())


def caches(graph: Path) -> list[Any]:
    return [i for i in Graph(graph).session.get_inputs() if i.name.startswith("past_key_values")]


@pytest.mark.slow
def test_genai_config_says_what_the_graph_has(exported: Exported, shape: str) -> None:
    context = context_length(exported.model.config, load_tokenizer(str(exported.folder)))
    generation = {
        **{"bos_token_id": None, "eos_token_id": [2, 0], "pad_token_id": 2},
        **{"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 50},
    }
    config = genai_config(exported.quantised, exported.model.config, generation, context)
    model, decoder = config["model"], config["model"]["decoder"]
    assert (model["context_length"], model["vocab_size"]) == (1024, 600)
    assert (model["eos_token_id"], model["pad_token_id"]) == ([2, 0], 2)
    assert "bos_token_id" not in model
    assert decoder["filename"] == "onnx/model_quantized.onnx"
    assert decoder["num_hidden_layers"] == 2
    assert decoder["num_attention_heads"] == 4
    assert decoder["hidden_size"] == 64
    assert decoder["num_key_value_heads"] == SHAPES[shape].heads
    assert decoder["head_size"] == SHAPES[shape].size
    assert config["search"]["max_length"] == 1024
    exported.model.config.num_hidden_layers = 3
    try:
        with pytest.raises(GateError, match="has 2 layers, the model 3"):
            genai_config(exported.quantised, exported.model.config, generation, context)
    finally:
        exported.model.config.num_hidden_layers = 2


def test_the_context_is_the_models_or_its_tokenizers() -> None:
    from types import SimpleNamespace as Namespace

    unlimited = Namespace(model_max_length=int(1e30))
    config = Namespace(model_type="mpt", max_seq_len=2048)
    assert context_length(config, unlimited) == 2048
    assert context_length(Namespace(), Namespace(model_max_length=512)) == 512
    with pytest.raises(ConfigError, match="bloom model has no context length"):
        context_length(Namespace(model_type="bloom"), unlimited)


def test_windows_count_tokens_and_the_usual_mask_counts_columns() -> None:
    """A row of five tokens with a gap of two columns, and a window of three tokens."""
    from types import SimpleNamespace as Namespace

    from cai_export.windows import windows_in_tokens
    from transformers.masking_utils import create_sliding_window_causal_mask

    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1]])

    def last_row() -> list[int]:
        config = Namespace(sliding_window=3, _attn_implementation="sdpa", is_causal=True)
        made = create_sliding_window_causal_mask(
            config, torch.zeros(1, 7, 4), mask, past_key_values=None
        )
        return np.flatnonzero(made[0, 0, -1].numpy()).tolist()

    with windows_in_tokens():
        assert last_row() == [2, 5, 6]
    assert last_row() == [5, 6]
