"""The settings by which onnxruntime-genai reads a bundle."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_scale.errors import GateError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def genai_config(
    graph: Path, model: "PretrainedConfig", generation: Mapping[str, Any], context: int
) -> dict[str, Any]:
    """What `genai_config.json` holds for one graph.

    Args:
        graph: `<bundle>/onnx/<name>.onnx`; its inputs and outputs are read, not its weights.
        generation: the bundle's `generation_config.json`.
        context: the longest prompt and answer together, in tokens.

    Raises:
        GateError: the graph has other layers than the model's configuration says.
    """
    import onnx

    contract = onnx.load(str(graph), load_external_data=False).graph
    inputs = {value.name: value for value in contract.input}
    caches = [name for name in inputs if name.endswith(".key")]
    shape = normalised(model)
    if len(caches) != shape.num_layers:
        raise GateError(f"{graph} has {len(caches)} layers, the model {shape.num_layers}")
    _, heads, _, size = inputs[caches[0]].type.tensor_type.shape.dim
    names = ("input_ids", "attention_mask", "position_ids")
    decoder = {
        "session_options": {"provider_options": []},
        "filename": graph.relative_to(graph.parents[1]).as_posix(),
        "hidden_size": shape.hidden_size,
        "head_size": size.dim_value,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": heads.dim_value,
        "num_hidden_layers": len(caches),
        "inputs": {name: name for name in names if name in inputs} | _caches("past_key_values"),
        "outputs": {"logits": "logits"} | _caches("present"),
    }
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    search = ("do_sample", "temperature", "top_p", "top_k")
    return {
        "model": {
            # One type for all: it says how the graph is called, not which architecture it is.
            "type": "decoder",
            "context_length": context,
            "vocab_size": shape.vocab_size,
            **{name: generation[name] for name in tokens if generation[name] is not None},
            "decoder": decoder,
        },
        "search": {
            "max_length": context,
            **{name: generation[name] for name in search},
            # The graph returns a longer cache; it does not write into the one it was given.
            "past_present_share_buffer": False,
        },
    }


def normalised(config: "PretrainedConfig") -> Any:
    """An architecture's sizes under one set of names, as optimum knows them."""
    from optimum.utils import NormalizedConfigManager, NormalizedTextConfig

    try:
        reader = NormalizedConfigManager.get_normalized_config_class(config.model_type)
    except KeyError:  # newer than optimum's list: the usual names
        reader = NormalizedTextConfig
    return reader(config)


def _caches(side: str) -> dict[str, str]:
    short = side.removesuffix("_key_values")
    return {f"{short}_{kind}_names": f"{side}.%d.{kind}" for kind in ("key", "value")}
