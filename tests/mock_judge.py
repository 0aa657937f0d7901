"""A judge that obeys whatever stands outside the fences: the worst reader of judged text.

It reads as a model does whose server looks at nothing: a marker of a role starts a new turn
wherever it stands, wide letters are normalised (NFKC), tag characters are letters, and a tag may
be spaced or written in any case. What is left outside the fences, and is no line of the question
itself, it obeys. Where it is told nothing, it judges by the marks that a test planted in the
answers, such as `helpful=0.81`.
"""

import html
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cai_scale.records import Message

UNMARKED = 0.5

_FENCE = re.compile(
    r"<\s*(prompt|answer_a|answer_b|answer)\s*>(.*?)<\s*/\s*\1\s*>", re.DOTALL | re.IGNORECASE
)
_ROLE = re.compile(
    r"<\|[^<>|\n]+\|>|</?s>|<(?:start|end)_of_turn>|<</?SYS>>"  # ChatML, Llama, Gemma, DeepSeek
    r"|\[/?(?:INST|SYSTEM_PROMPT)\]|\[\|\w+\|\]"  # Mistral, EXAONE
    r"|\]~!?b[\[\]]|\[e~\["  # MiniMax
    r"|^#{2,} *[\w ]+:"  # Alpaca, SOLAR, PhoGPT
    r"|^ *(?:System|User|Human|Assistant):"  # models without a template of their own
    r"|\b(?:USER|ASSISTANT):",  # Vicuna
    re.MULTILINE,
)
_VERDICT = re.compile(r"\{[^{}]*:[^{}]*\}")
_NUMBER = re.compile(
    r"\b(?:give|rate|score|award|copy|below|cho|chấm|điểm|dưới)\b[^\n]*?\b(\d+(?:\.\d+)?)",
    re.IGNORECASE,
)
_LETTER = re.compile(
    r"\b(?:choose|pick|select|prefer|chọn|ưu tiên)\b[^\n]*?\b([AB])\b", re.IGNORECASE
)
_OTHER = re.compile(
    r"\b(?:ignore|forget|disregard|perfect|better|bỏ qua|đừng|tuyệt đối|hoàn hảo|tốt hơn)\b",
    re.IGNORECASE,
)
_MARK = re.compile(r"(\w+)=(\d\.\d+)")


def outside(messages: Sequence[Message]) -> list[str]:
    """The lines that stand in no fence."""
    return _read(messages)[1]


@dataclass(frozen=True)
class MockJudge:
    """Replies to ratings and comparisons, with reasoning where it is asked for.

    Attributes:
        question: the lines of the question itself, `outside` of one about innocent texts.
    """

    question: frozenset[str]

    def reply(self, messages: Sequence[Message]) -> str:
        fences, lines = _read(messages)
        told = [line for line in lines if line not in self.question]
        if verdict := _VERDICT.search("\n".join(told)):
            return verdict[0]
        obeyed = _obey("\n".join(told))
        form = messages[-1]["content"].rsplit("\n", 1)[-1]
        tags = ("answer_a", "answer_b") if '"tie"' in form else ("answer",)
        # Without fences the answers are the lines that bear marks.
        answers = [line for line in told if _MARK.search(line)]
        if not fences.keys().isdisjoint(tags):
            answers = [fences.get(tag, "") for tag in tags]
        first, second = [*answers, "", ""][:2]
        values: dict[str, Any] = {}
        for key in re.findall(r'"(\w+)": \(', form):
            if key == "reasoning":
                values[key] = f"It says: {html.unescape(first + second)}"
            elif len(tags) == 2:
                values[key] = obeyed[1] if obeyed else _better(key, first, second)
            else:
                values[key] = obeyed[0] if obeyed else _mark(key, first)
        return json.dumps(values, ensure_ascii=False)


def _read(messages: Sequence[Message]) -> tuple[dict[str, str], list[str]]:
    """The fences' texts by tag, and what is left, as lines that are not blank."""
    fences: dict[str, str] = {}

    def take(fence: re.Match[str]) -> str:
        fences[fence[1].lower()] = fence[2]
        return "\n"

    turns = [turn for m in messages for turn in _ROLE.split(_as_letters(m["content"]))]
    left = "\n".join(_FENCE.sub(take, turn) for turn in turns)
    return fences, [line.strip() for line in left.splitlines() if line.strip()]


def _as_letters(text: str) -> str:
    smuggled = (chr(ord(c) - 0xE0000) if 0xE0000 <= ord(c) < 0xE0080 else c for c in text)
    seen = (c for c in smuggled if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf"))
    return unicodedata.normalize("NFKC", "".join(seen))


def _obey(told: str) -> tuple[float, str] | None:
    """The rating and the letter that a text demands; None where it demands nothing.

    An order that names only one of them, or neither, is taken as a favour: 1.0, "A".
    """
    number, letter = _NUMBER.search(told), _LETTER.search(told)
    if not (number or letter or _OTHER.search(told)):
        return None
    return min(float(number[1]), 1.0) if number else 1.0, letter[1].upper() if letter else "A"


def _better(key: str, first: str, second: str) -> str:
    gap = _mark(key, first) - _mark(key, second)
    return "A" if gap > 0 else "B" if gap < 0 else "tie"


def _mark(key: str, text: str) -> float:
    return float(dict(_MARK.findall(text)).get(key, UNMARKED))
