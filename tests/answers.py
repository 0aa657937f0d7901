"""Constitutions of a few words, and held-out prompts with their answers, for tests."""

from typing import Any

from cai_scale import constitution
from cai_scale.constitution import Constitution
from cai_scale.constitution.schema import REQUESTS
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.evaluation.compare import Answered, Measure
from cai_scale.records import Prompt, Response

Lists = dict[str, tuple[float, list[str]]]


def rules(principles: dict[str, tuple[float, float, Lists]], language: str = "en") -> Constitution:
    """A constitution of {id: (weight, start, {list: (effect, terms)})}."""
    said = {language: "words"}
    data: dict[str, Any] = {
        "schema": 1,
        "name": "few words",
        "languages": [language],
        "requests": dict.fromkeys(REQUESTS, said),
        "principles": [
            {
                "id": name,
                "weight": weight,
                "title": said,
                "statement": said,
                "lexicon": {
                    "start": start,
                    "lists": [
                        {"id": key, "effect": effect, "terms": {language: terms}}
                        for key, (effect, terms) in lists.items()
                    ],
                },
            }
            for name, (weight, start, lists) in principles.items()
        ],
    }
    return constitution.from_dict(data)


def answered(
    before: str,
    after: str,
    scored_by: Constitution | None = None,
    *,
    language: str = "en",
    category: str = "",
    relevance: tuple[float | None, float | None] = (None, None),
) -> Answered:
    """A prompt with two answers, scored by a lexicon: the default's, or another."""
    critic = LexiconCritic(scored_by or constitution.load())
    scores = critic.score(["", ""], [before, after])
    message = {"role": "user", "content": "Why?"}
    return Answered(
        prompt=Prompt(id="p", messages=(message,), language=language, category=category),
        before=_response(before),
        after=_response(after),
        before_score=scores[0],
        after_score=scores[1],
        before_measure=Measure(relevance=relevance[0]),
        after_measure=Measure(relevance=relevance[1]),
    )


def _response(text: str) -> Response:
    tokens = len(text.split())
    return Response(
        prompt_id="p", sample=0, round=0, temperature=0.7, text=text, tokens=tokens, finished=True
    )
