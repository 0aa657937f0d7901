"""Chat templates and tokens without transformers."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from cai_scale.errors import DataError
from cai_scale.records import Message, read_json
from cai_scale.runtime.bundle import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, Bundle

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Chat:
    """Renders a conversation as the model was trained to read it, and counts it in tokens.

    The environment of the templates is the one that transformers documents: sandboxed, blocks
    trimmed, `raise_exception` and `tojson` at hand.
    """

    def __init__(self, bundle: Bundle, part: str = "") -> None:
        """Read the tokenizer of a bundle, or of a `part` of it that has its own."""
        folder = bundle.path / part
        self.tokenizer = _tokenizer(folder)
        settings = read_json(folder / TOKENIZER_CONFIG)
        self._special = {name: _text(settings[name]) for name in SPECIAL if settings.get(name)}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = time.strftime
        self._template = environment.from_string((folder / TEMPLATE).read_text("utf-8"))

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation that waits for the assistant's answer."""
        return self._encode(messages, waiting=True)

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation that ends with the assistant's answer."""
        return self._encode(messages, waiting=False)

    def _encode(self, messages: Sequence[Message], *, waiting: bool) -> list[int]:
        for message in messages:
            if any("\ud800" <= letter <= "\udfff" for letter in message["content"]):
                raise DataError(f"{message['content'][:40]!a}: not Unicode text; write it in UTF-8")
        try:
            text = self._template.render(
                messages=list(messages), add_generation_prompt=waiting, **self._special
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from None
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def _tokenizer(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(path / TOKENIZER))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _raise(message: str) -> None:
    raise TemplateError(message)
