"""LoRA adapters: their settings, and the check that a saved one is real."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cai_scale.errors import IntegrityError, MissingError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

Shapes = Mapping[str, tuple[int, ...]]


def lora(r: int, alpha: int, dropout: float) -> "LoraConfig":
    """LoRA on every linear layer but the head: attention and MLP projections, on GPT-2 too."""
    from peft import LoraConfig

    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def adapter_shapes(model: "PeftModel") -> Shapes:
    """The names and shapes that a saved adapter of this model must have.

    Under ZeRO-3 a parameter lies in pieces, and its whole shape is its `ds_shape`. A module that
    is trained whole, such as a score head, is saved under its plain name.
    """
    whole = ".modules_to_save.default."
    return {
        name.replace(whole, ".").replace(".default.", "."): tuple(
            getattr(parameter, "ds_shape", parameter.shape)
        )
        for name, parameter in model.named_parameters()
        if ".lora_" in name or whole in name
    }


def check_adapter(folder: Path, expected: Shapes | None = None) -> None:
    """Reopen a saved adapter and make sure that it holds a training.

    Raises:
        MissingError: the folder lacks one of its two files.
        IntegrityError: a file cannot be read, a tensor is missing, misshapen, empty or not
            finite, or every lora_B is still zero, as it is before training.
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
    if not any(bool(t.any()) for name, t in tensors.items() if ".lora_B." in name):
        raise damaged("every lora_B is zero, so nothing was learned")
