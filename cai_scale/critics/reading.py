"""How a model reads a conversation, by its tokenizer and template; whether two do so alike."""

import json
from collections.abc import Mapping
from typing import Any

from cai_scale.errors import ConfigError
from cai_scale.records import read_json
from cai_scale.runtime.bundle import REWARD, TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, Bundle

# What turns a conversation into tokens, by what it is called in an error. What only pads, cuts,
# decodes, or adds tokens to a text without a template is left out.
Reading = Mapping[str, Any]


def reading_of_model(model: str) -> Reading:
    """How a model's folder, or a model by its name, reads.

    Raises:
        ConfigError: its tokenizer cannot be loaded.
    """
    from cai_scale.training.models import load_tokenizer

    tokenizer: Any = load_tokenizer(model)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = {"model": {"vocab": tokenizer.get_vocab()}}
    if backend is not None:
        state = json.loads(backend.to_str())
    special = (tokenizer.bos_token, tokenizer.eos_token)
    return _reading(state, str(tokenizer.chat_template), special)


def reading_of_bundle(bundle: Bundle) -> Reading:
    """How a bundle's reward model reads."""
    from tokenizers import Tokenizer

    folder = bundle.path / REWARD
    state = json.loads(Tokenizer.from_file(str(folder / TOKENIZER)).to_str())
    settings = read_json(folder / TOKENIZER_CONFIG)
    special = (_text(settings.get("bos_token")), _text(settings.get("eos_token")))
    return _reading(state, (folder / TEMPLATE).read_text("utf-8"), special)


def check_same(reward: str, theirs: Reading, policy: str, ours: Reading) -> None:
    """Complain about a reward model that reads otherwise than the policy.

    Raises:
        ConfigError: something differs; it is named.
    """
    for part, value in ours.items():
        if theirs[part] != value:
            raise ConfigError(
                f"reward model {reward} reads text otherwise than the policy {policy}: another "
                f"{part}; name a reward model with the policy's tokenizer"
            )


def _reading(state: Mapping[str, Any], template: str, special: tuple[Any, ...]) -> Reading:
    added = {
        token["content"]: [token[key] for key in ("id", "lstrip", "rstrip", "single_word")]
        for token in state.get("added_tokens", ())
    }
    return {
        "vocabulary": state["model"].get("vocab"),
        "list of merges": state["model"].get("merges"),
        "set of special tokens": (added, special),
        "normaliser": state.get("normalizer"),
        "division into words": state.get("pre_tokenizer"),
        "chat template": template,
    }


def _text(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token
