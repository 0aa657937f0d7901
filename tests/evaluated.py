"""Answers before and after, for tests of what the evaluation makes of them."""

from cai_scale.evaluation.compare import Answered, Measure
from cai_scale.records import Prompt, Response


def evaluated(
    id: str,
    before: str,
    after: str,
    *,
    language: str = "en",
    category: str = "",
    finished: bool = True,
    before_measure: Measure | None = None,
    after_measure: Measure | None = None,
) -> Answered:
    """A prompt with two answers that nobody has scored."""

    def response(text: str) -> Response:
        return Response(
            prompt_id=id, sample=0, round=0, temperature=0.7, text=text, tokens=len(text.split()),
            finished=finished,
        )  # fmt: skip

    asked = {"role": "user", "content": "q"}
    return Answered(
        prompt=Prompt(id=id, messages=(asked,), language=language, category=category),
        before=response(before),
        after=response(after),
        before_score=None,
        after_score=None,
        before_measure=before_measure or Measure(),
        after_measure=after_measure or Measure(),
    )
