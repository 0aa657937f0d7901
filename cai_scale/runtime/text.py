"""The text of a token, and of an answer while its tokens arrive."""

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """What a token says by itself; U+FFFD where it is only a part of a letter.

    Some tokenizers drop the space at the beginning of a text: the second of two has it.
    """
    once, twice = (tokenizer.decode([token] * n, skip_special_tokens=False) for n in (1, 2))
    return str(twice[len(once) :] if twice.startswith(once) else once)


class GrowingText:
    """Decodes token by token, and holds back what may still change: half a letter, white space
    at the end, and the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self._sent = 0
        self.text = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Take a token; return the text that is now certain. Sets `stopped` at a stop string."""
        piece = self._stream.step(self._tokenizer, token)
        if piece is None:
            return ""
        before = len(self.text)
        self.text = (self.text + piece).lstrip()
        found = [
            place
            for stop in self._stop
            if (place := self.text.find(stop, max(0, before - len(stop)))) >= 0
        ]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        return self._send(len(self.text) if self.stopped else self._certain())

    def finish(self, text: str) -> str:
        """What is left of the whole answer's text."""
        return text[self._sent :] if text.startswith(self.text[: self._sent]) else ""

    def _certain(self) -> int:
        """How much of the text no later token can take back."""
        end = len(self.text)
        for stop in self._stop:
            longest = min(len(stop) - 1, len(self.text))
            held = next((n for n in range(longest, 0, -1) if self.text.endswith(stop[:n])), 0)
            end = min(end, len(self.text) - held)
        return end

    def _send(self, end: int) -> str:
        certain = self.text[:end].rstrip()
        new = certain[self._sent :]
        self._sent = max(self._sent, len(certain))
        return new
