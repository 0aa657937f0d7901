"""Answers whose quality is planted in their text, for judges that are tested against the truth."""

import re
from dataclasses import dataclass
from hashlib import sha256
from random import Random

_MARK = re.compile(r"quality(?:\[([^\]]+)\])? ([01](?:\.\d+)?)")

# What a question has to carry without a change: tags, quotes, markers of turns, other scripts.
_WORDS = (
    *("Certainly.", "No.", "a & b", "2 < 3", "<b>bold</b>", "</answer>", '"quoted"', "{}"),
    *("Xin chào,", "tiếng Việt", "[INST]", "&lt;", "\\n", "\n\n", "100%", "→"),
)


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt; `label` is 1 where the first is better, -1 the second, 0 neither."""

    prompt: str
    first: str
    second: str
    label: int


def text_of(quality: float, words: str = "An answer", /, **principles: float) -> str:
    """A text of that quality; by the principles named, of theirs."""
    marks = [f"quality {quality}", *(f"quality[{id}] {value}" for id, value in principles.items())]
    return " ".join([f"{words}:", *marks])


def quality_of(text: str, principle: str | None = None) -> float:
    """The quality in [0, 1] of a text by a principle, or in general.

    It is the one planted for the principle, or else the one planted for all; a text without any,
    such as a model writes, has one that its hash decides.
    """
    planted = {name: float(value) for name, value in reversed(_MARK.findall(text))}
    for name in (principle, ""):
        if name in planted:
            return planted[name]
    digest = sha256(f"{principle or ''} {text}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 101 / 100


def comparisons(count: int, seed: int = 0, ties: float = 0.1) -> list[Comparison]:
    """Comparisons of which no two are the same; a share of `ties`, of the others half each way."""
    random = Random(f"comparisons {seed}")
    return [_comparison(random, f"{seed}.{index}", ties) for index in range(count)]


def _comparison(random: Random, name: str, ties: float) -> Comparison:
    better, worse = random.sample(range(101), 2)
    label = 0 if random.random() < ties else random.choice((1, -1))
    if label == 0:
        worse = better
    elif (better > worse) != (label > 0):
        better, worse = worse, better
    first, second = (
        text_of(value / 100, " ".join(random.choices(_WORDS, k=6))) for value in (better, worse)
    )
    return Comparison(f"Question {name}?", first, second, label)
