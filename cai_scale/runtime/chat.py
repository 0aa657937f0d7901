"""Chat templates and tokens without transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from cai_scale.errors import DataError
from cai_scale.records import Message, read_json
from cai_scale.runtime.bundle import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, Bundle
from cai_scale.runtime.template import compile_template

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Chat:
    """Renders a conversation as the model was trained to read it, and counts it in tokens."""

    def __init__(self, bundle: Bundle, part: str = "") -> None:
        """Read the tokenizer of a bundle, or of a `part` of it that has its own."""
        folder = bundle.path / part
        self.tokenizer = _tokenizer(folder)
        settings = read_json(folder / TOKENIZER_CONFIG)
        self._special = {name: _text(settings[name]) for name in SPECIAL if settings.get(name)}
        self._template = compile_template((folder / TEMPLATE).read_text("utf-8"))

    def render(self, messages: Sequence[Message], *, answer: bool = True) -> str:
        """A conversation as the model reads it; with `answer`, up to where its answer begins.

        Raises:
            DataError: a message is not Unicode text, or the template refuses the conversation.
        """
        for message in messages:
            if any("\ud800" <= letter <= "\udfff" for letter in message["content"]):
                raise DataError(f"{message['content'][:40]!a}: not Unicode text; write it in UTF-8")
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=answer,
                **self._special,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from None

    def encode(self, messages: Sequence[Message], *, answer: bool = True) -> list[int]:
        """The tokens of what `render` makes of a conversation."""
        text = self.render(messages, answer=answer)
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
