"""Training methods, one file each: pairs, answers or prompts in, an adapter or a model out."""

from importlib import import_module
from typing import Any

from cai_scale.errors import ConfigError

NAMES = ("dpo", "sft", "reward", "rlaif", "grpo")
# The source's, and those that trl's DPOTrainer knows and that need no further setting.
DPO_LOSSES = (
    *("sigmoid", "margin", "sigmoid_norm", "hinge", "ipo", "nca_pair", "robust", "bco_pair"),
    *("sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft"),
)


def load_method(name: str) -> Any:
    """The module of that name, which has a function `train` that takes a `Task`.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    if name not in NAMES:
        raise ConfigError(f"unknown method {name!r}; choose one of: {', '.join(NAMES)}")
    return import_module(f"cai_scale.methods.{name}")
