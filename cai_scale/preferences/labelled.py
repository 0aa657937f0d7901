"""Read pairs from a file of any origin, checked row by row."""

from collections.abc import Mapping
from math import nan
from pathlib import Path
from typing import Any

from cai_scale.errors import DataError, MissingError
from cai_scale.preferences.pairs import pair_of
from cai_scale.records import Candidate, Pair, read_jsonl


def read_labelled(path: Path) -> list[Pair]:
    """The pairs of a run's `pairs.jsonl`, or of rows of three texts.

    A row of texts has `prompt`, `chosen` and `rejected`, and perhaps `id` and `language`. What it
    does not say, the scores and temperatures, is NaN.

    Raises:
        MissingError: there is no such file.
        DataError: it has no rows, or one of them is no pair; the row and the column are named.
    """
    if not path.is_file():
        raise MissingError(
            f"{path} does not exist; name a run's pairs.jsonl, or JSON Lines with prompt, chosen "
            f"and rejected"
        )
    pairs = []
    for row, record in read_jsonl(path):
        try:
            pairs.append(_stored(record) if "messages" in record else _texts(row, record))
        except DataError as error:
            raise DataError(f"{path}: row {row}: {error}") from None
    if not pairs:
        raise DataError(f"{path}: no rows; write at least one with prompt, chosen and rejected")
    return pairs


def _texts(row: int, record: Mapping[str, Any]) -> Pair:
    def candidate(column: str) -> Candidate:
        text = _text(record.get(column), column)
        return Candidate(text=text, score=nan, temperature=nan, revised=False)

    return Pair(
        prompt_id=str(record.get("id", row)),
        language=_text(record.get("language", "en"), "language"),
        messages=({"role": "user", "content": _text(record.get("prompt"), "prompt")},),
        chosen=candidate("chosen"),
        rejected=candidate("rejected"),
    )


def _stored(record: Mapping[str, Any]) -> Pair:
    try:
        pair = pair_of(record)
    except (KeyError, TypeError) as error:
        raise DataError(f"not as a run writes it ({error}); restore the file") from None
    _text(pair.language, "language")
    for message in pair.messages:
        content = message.get("content") if isinstance(message, dict) else None
        _text(content, "messages")
    if not pair.messages:
        raise DataError("column `messages`: empty; restore the file")
    for column, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        _text(answer.text, f"{column}.text")
        for name in ("score", "temperature"):
            _number(getattr(answer, name), f"{column}.{name}")
        for name in ("principles", "votes"):
            numbers = getattr(answer, name)
            for number in numbers.values() if isinstance(numbers, dict) else [None]:
                _number(number, f"{column}.{name}")
    return pair


def _text(value: object, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        kind = "empty" if isinstance(value, str) else type(value).__name__
        kind = "missing" if value is None else kind
        raise DataError(f"column `{column}`: {kind}, expected a text that is not empty")
    return value


def _number(value: object, column: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise DataError(f"column `{column}`: {type(value).__name__}, expected a number")
