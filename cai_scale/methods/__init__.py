"""Training methods, one file each: pairs or prompts in, an adapter out."""

from importlib import import_module
from typing import Any

from cai_scale.errors import ConfigError

NAMES = ("dpo",)


def load_method(name: str) -> Any:
    """The module of that name, which has a function `train`.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    if name not in NAMES:
        raise ConfigError(f"unknown method {name!r}; choose one of: {', '.join(NAMES)}")
    return import_module(f"cai_scale.methods.{name}")
