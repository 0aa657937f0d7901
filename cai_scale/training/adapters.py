"""LoRA adapters: their settings, and the check that a saved one is real."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_scale.config import Config
from cai_scale.errors import IntegrityError, MissingError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
GUARD = "guard.json"  # in a product that a guard chose: what it saw of it, and after which step

Shapes = Mapping[str, tuple[int, ...]]


def lora(config: Config, *, task: str = "CAUSAL_LM", whole: Sequence[str] = ()) -> "LoraConfig":
    """LoRA on every linear layer but the heads: attention and MLP projections.

    peft finds them by their kind, GPT-2's Conv1D (`c_attn`, `c_proj`, `c_fc`) among them.

    Args:
        task: peft's name for what the model does: "CAUSAL_LM", or "SEQ_CLS" for a scorer.
        whole: modules that are trained and saved whole, without LoRA, such as a score head.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        exclude_modules=list(whole) or None,
        modules_to_save=list(whole) or None,
        task_type=task,
    )


def adapt(model: "PreTrainedModel", settings: "LoraConfig", *, seed: int) -> "PeftModel":
    """Put a new adapter on a model, with the same random numbers on every rank.

    Its weights are fp32, but under ZeRO-3, which gathers parameters of one format together and
    keeps fp32 copies itself.
    """
    from peft import get_peft_model
    from transformers import set_seed
    from transformers.integrations import is_deepspeed_zero3_enabled

    set_seed(seed)
    sharded = is_deepspeed_zero3_enabled()
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=not sharded)
    if not sharded:  # peft leaves out what is trained whole
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return adapted


def leave_formats_to_autocast(model: Any) -> None:
    """Keep peft from turning the input of every LoRA layer to fp32, which autocast turns back."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def load_into(model: "PeftModel", folder: Path) -> None:
    """Give a model whose adapter is new the weights of a saved one, to train on.

    The adapter of a policy has no score head: where it starts a reward model, the head stays new.

    Raises:
        IntegrityError: the saved adapter has other layers or shapes.
    """
    import torch
    from safetensors.torch import load_file

    expected = adapter_shapes(model)
    if json.loads((folder / CONFIG).read_text("utf-8")).get("task_type") == "CAUSAL_LM":
        expected = {name: shape for name, shape in expected.items() if ".lora_" in name}
    check_adapter(folder, expected)
    saved = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if _saved_name(name) in expected:
                with gathered(parameter):
                    parameter.copy_(saved[_saved_name(name)])


@contextmanager
def gathered(parameter: "torch.nn.Parameter") -> Iterator[None]:
    """The parameter is whole in this block, which may change it, where ZeRO-3 has it in pieces."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
        yield


def _saved_name(name: str) -> str:
    """What a parameter of a model is called in an adapter's file; a module that is trained whole,
    such as a score head, has its plain name there."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def masters(model: Any) -> dict[str, "torch.Tensor"]:
    """The fp32 weights that DeepSpeed's optimizer moves, where the model computes in 16 bits with
    copies of them, by the names of a saved adapter. Collective: every rank takes part."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {
        _saved_name(name): safe_get_full_fp32_param(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return {name: tensor.cpu() for name, tensor in found.items() if tensor is not None}


def overwrite(folder: Path, weights: Mapping[str, "torch.Tensor"]) -> None:
    """Put these weights in the place of those that a saved adapter has under their names."""
    from safetensors.torch import load_file

    if weights:
        saved = load_file(folder / WEIGHTS)
        kept = {name: weights.get(name, tensor).contiguous() for name, tensor in saved.items()}
        replace(folder / WEIGHTS, kept)


def replace(file: Path, tensors: Mapping[str, "torch.Tensor"]) -> None:
    """Write a safetensors file aside and rename it: tensors that were loaded from the file in its
    place are still read from there."""
    from safetensors.torch import save_file

    aside = file.with_name(f".{file.name}")
    save_file(dict(tensors), aside, metadata={"format": "pt"})
    aside.replace(file)


def keep_only_the_adapter(folder: Path) -> None:
    """The trainer also writes its arguments as a pickle, and the base model's tokenizer."""
    for path in folder.iterdir():
        if path.name not in (CONFIG, WEIGHTS):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def adapter_shapes(model: "PeftModel") -> Shapes:
    """The names and shapes that a saved adapter of this model must have.

    Under ZeRO-3 a parameter lies in pieces, and its whole shape is its `ds_shape`.
    """
    return {
        _saved_name(name): tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
        if ".lora_" in name or ".modules_to_save.default." in name
    }


def check_adapter(folder: Path, expected: Shapes | None = None) -> None:
    """Reopen a saved adapter and make sure that it holds a training.

    Raises:
        MissingError: the folder lacks one of its two files.
        IntegrityError: a file cannot be read, a tensor is missing, misshapen, empty or not
            finite, or every lora_B is still zero, as it is before training, and no guard says that
            this is the best.
    """
    from safetensors import SafetensorError, safe_open

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise MissingError(f"adapter {folder} has no {name}; name a folder of a finished run")
    path = folder / WEIGHTS
    try:
        json.loads((folder / CONFIG).read_text("utf-8"))
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise IntegrityError(
            f"adapter {folder} is corrupt ({error}); restore it or train again"
        ) from None

    def damaged(what: str) -> IntegrityError:
        return IntegrityError(f"adapter {path}: {what}; restore it or train again")

    for name in sorted({*tensors, *(expected or tensors)}):
        if name not in tensors:
            raise damaged(f"{name} is missing")
        if expected is not None and name not in expected:
            raise damaged(f"{name} was not trained")
        shape = tuple(tensors[name].shape)
        if expected is not None and shape != expected[name]:
            raise damaged(f"{name} has shape {shape}, expected {expected[name]}")
        if tensors[name].numel() == 0:
            raise damaged(f"{name} is empty")
        if not bool(tensors[name].isfinite().all()):
            raise damaged(f"{name} holds NaN or Inf")
    if not _learned(tensors) and not _kept_as_it_was(folder):
        raise damaged("every lora_B is zero, so nothing was learned")


def _kept_as_it_was(folder: Path) -> bool:
    """Whether a guard found nothing better than the policy before the training."""
    with suppress(OSError, ValueError):
        return bool(json.loads((folder / GUARD).read_text("utf-8"))["step"] == 0)
    return False


def is_new(folder: Path) -> bool:
    """Whether a saved adapter has learned nothing yet: with it a model is as without it."""
    from safetensors.torch import load_file

    return not _learned(load_file(folder / WEIGHTS))


def _learned(tensors: Mapping[str, "torch.Tensor"]) -> bool:
    return any(bool(tensor.any()) for name, tensor in tensors.items() if ".lora_B." in name)
