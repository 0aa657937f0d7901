"""A reward head on the model under training, which predicts the critic's score of each row.

It lies inside the causal language model, and so does the copy that it may have as a backbone of
its own: one forward pass gives logits and predictions, under DDP and every stage of ZeRO, and
checkpoints hold both. What is saved at the end is taken apart again: an ordinary adapter or model,
and a file of the head.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cai_scale.errors import IntegrityError
from cai_scale.records import read_json, write_json
from cai_scale.training import adapters
from cai_scale.training.log_probs import log_probs
from cai_scale.training.packing import pack
from cai_scale.training.scorer import HEAD, Head, at_last_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BACKBONE = "score_backbone"  # the copy that predicts in the policy's place, where there is one
PREDICTED = "predicted"
INDEX = "model.safetensors.index.json"


def attach(
    model: "PreTrainedModel", *, copy: "PreTrainedModel | None" = None, detached: bool = False
) -> None:
    """Give a causal language model a new reward head.

    Called with `predict=True`, it returns `log_probs`, [rows, tokens - 1], fp32, those of each
    row's tokens after the first, 0 for padding, and `predicted`, [rows], fp32: the head's output
    on the state of each row's last token. Called otherwise, in `generate` too, it is as it was.

    Args:
        copy: a model whose backbone gives the head's states in the model's place.
        detached: the head's gradient stops at the states.
    """
    config = model.config.get_text_config()
    model.score = Head(config.hidden_size, 1, device=model.device)
    # As transformers starts its heads.
    nn.init.normal_(model.score.weight, std=getattr(config, "initializer_range", 0.02))
    nn.init.zeros_(model.score.bias)
    if copy is not None:
        setattr(model, BACKBONE, getattr(copy, copy.base_model_prefix))

    generating = model.forward

    # Keeps the signature: `generate` reads it, and so does peft.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, predict: bool = False, **kwargs: Any) -> Any:
        if not predict:
            return generating(*args, **kwargs)
        states = self.base_model(**kwargs, use_cache=False).last_hidden_state
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        found = _log_probs(states, self.get_output_embeddings(), ids, mask)
        if copy is not None:
            states = getattr(self, BACKBONE)(**kwargs, use_cache=False).last_hidden_state
        last = at_last_token(states.detach() if detached else states, mask)
        return {"log_probs": found, PREDICTED: self.score(last).squeeze(-1)}

    model.forward = MethodType(forward, model)


def _log_probs(states: Tensor, head: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """As `forward` returns them. What rows begin with alike is predicted once."""
    packing = pack(ids, mask)
    predicted = packing.positions > 0
    places = packing.tokens[predicted]
    found = log_probs(states.flatten(0, 1)[places - 1], head, ids.flatten()[places])
    return found.new_zeros(len(predicted)).masked_scatter(predicted, found)[packing.spread][:, 1:]


def part_of_head(name: str) -> bool:
    """Whether a weight belongs to the head or to the backbone of its own."""
    return name.removeprefix("base_model.model.").split(".")[0] in (HEAD, BACKBONE)


def load(model: Any, product: Path, head: Path) -> None:
    """Continue from a finished training: its adapter, and its head where that fits.

    A whole model is loaded before the head is attached. A head that is not there, or that was
    trained on another backbone, leaves the new one in place.

    Raises:
        IntegrityError: the adapter has other layers or shapes, or the head cannot be read.
    """
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        saved = load_file(head) if head.is_file() else {}
    except SafetensorError as error:
        raise IntegrityError(
            f"reward head {head} is corrupt ({error}); restore it, or remove it to start a new one"
        ) from None
    if isinstance(model, PeftModel):
        shapes = adapters.adapter_shapes(model)
        policy = {name: shape for name, shape in shapes.items() if not part_of_head(name)}
        adapters.check_adapter(product, policy)
        saved = saved if _fits(saved, shapes) else {}
        new = get_peft_model_state_dict(model, save_embedding_layers=False)
        weights = {**new, **load_file(product / adapters.WEIGHTS), **saved}
        set_peft_model_state_dict(model, weights)
    elif _fits(saved, {n: getattr(p, "ds_shape", p.shape) for n, p in model.named_parameters()}):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in saved:
                    with adapters.gathered(parameter):
                        parameter.copy_(saved[name])


def _fits(saved: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> bool:
    expected = {name: tuple(shape) for name, shape in shapes.items() if part_of_head(name)}
    return {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected


def split(product: Path, head: Path) -> None:
    """Move the head out of a saved adapter or model, into a file that appears whole."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(product.glob("*.safetensors")):
        tensors = load_file(path)
        mine = {name: tensors.pop(name) for name in list(tensors) if part_of_head(name)}
        found |= mine
        if not tensors:
            path.unlink()
        elif mine:
            adapters.replace(path, tensors)
    if (product / INDEX).is_file():
        index = read_json(product / INDEX)
        index["weight_map"] = {
            name: file for name, file in index["weight_map"].items() if not part_of_head(name)
        }
        write_json(product / INDEX, index)
    if (product / adapters.CONFIG).is_file():
        config = json.loads((product / adapters.CONFIG).read_text("utf-8"))
        config |= {
            "modules_to_save": None,
            "exclude_modules": None,
            "target_modules": sorted(n for n in config["target_modules"] if not part_of_head(n)),
        }
        write_json(product / adapters.CONFIG, config)
    adapters.replace(head, found)
