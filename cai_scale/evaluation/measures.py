"""What is measured of held-out answers beside their scores, and the file of it. No torch."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cai_scale.errors import DataError
from cai_scale.evaluation import relevance
from cai_scale.evaluation.compare import Measure
from cai_scale.evaluation.likelihood import Reader, likelihood
from cai_scale.ranks import wait_for
from cai_scale.records import Prompt, Response, read_records, write_jsonl

WHEN = ("before", "after")
ENGLISH = "en"

Row = dict[str, Any]


def measure(
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    when: str,
    base: Reader,
    policy: Reader | None,
) -> list[Row]:
    """A row for each answer: its prompt's id, `when`, and the fields of its `Measure`.

    Args:
        when: "before" or "after".
        base, policy: see `likelihood.likelihood`.
    """
    related = _relevance(prompts, responses)
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        found = likelihood(prompt.messages, response.text, base, policy)
        measured = Measure(
            relevance=related.get(prompt.id),
            nll=_rounded(found.nll),
            kl=_rounded(found.kl),
            tokens=found.tokens,
        )
        rows.append({"prompt_id": prompt.id, "when": when, **asdict(measured)})
    return rows


def join(parts: Sequence[Path], prompts: Sequence[Prompt], file: Path) -> None:
    """Wait for the rows of every rank, write them in the order of the prompts, and remove them."""
    for part in parts:
        wait_for(part)
    rows = [row for part in parts for row in read_records(part, dict)]
    place = {prompt.id: index for index, prompt in enumerate(prompts)}
    rows.sort(key=lambda row: (WHEN.index(row["when"]), place[row["prompt_id"]]))
    write_jsonl(file, rows)
    for part in parts:
        part.unlink()


def read(file: Path, prompts: Sequence[Prompt]) -> dict[str, list[Measure]]:
    """The stored measures of the answers "before" and "after", in the order of the prompts.

    Raises:
        DataError: they are of other answers.
    """
    rows = read_records(file, lambda row: ((row.pop("when"), row.pop("prompt_id")), Measure(**row)))
    asked = [(when, prompt.id) for when in WHEN for prompt in prompts]
    if [key for key, _ in rows] != asked:
        raise DataError(f"{file} does not hold the measures of its answers; remove it")
    found = [measured for _, measured in rows]
    return {"before": found[: len(prompts)], "after": found[len(prompts) :]}


def _relevance(prompts: Sequence[Prompt], responses: Sequence[Response]) -> dict[str, float]:
    """By the prompt's id; of English answers that are not empty, where the embeddings are there."""
    chosen = [
        (prompt, response)
        for prompt, response in zip(prompts, responses, strict=True)
        if prompt.language == ENGLISH and response.text.strip()
    ]
    if not chosen or not relevance.available():
        return {}
    found = relevance.relevance([p.text for p, _ in chosen], [r.text for _, r in chosen])
    return {p.id: round(float(value), 6) for (p, _), value in zip(chosen, found, strict=True)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
