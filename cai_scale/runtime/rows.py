"""Rows of a JSONL stream, read one at a time; a bad one is handed on, not raised."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from cai_scale.errors import DataError
from cai_scale.records import parse_object

LONGEST_LINE = 32 * 1024 * 1024  # bytes: room for a text of 10 MB with every letter escaped


@dataclass(frozen=True)
class Row:
    """An answer to score. `number` counts lines from 1, 0 for one from the command line."""

    number: int
    prompt: str
    response: str
    id: str | int | None = None


@dataclass(frozen=True)
class BadRow:
    """A line that holds no answer to score, and why."""

    number: int
    error: str


def read_rows(file: IO[bytes]) -> Iterator[Row | BadRow]:
    """A row for every line that is not blank; no line is waited for that is not asked for."""
    for number, line in enumerate(_lines(file), 1):
        if line is None:
            yield BadRow(number, f"longer than {LONGEST_LINE} bytes; cut the answer")
        elif line.strip():
            try:
                yield _row(number, line)
            except DataError as error:
                yield BadRow(number, str(error))


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Each line, or None for one that is too long, of which no more is kept."""
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) <= LONGEST_LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(1024 * 1024)
        yield None


def _row(number: int, line: bytes) -> Row:
    record = parse_object(line.strip())
    prompt, response = (text(record.get(key), f"column `{key}`") for key in ("prompt", "response"))
    match record.get("id"):
        case None | int() as identity:
            return Row(number, prompt, response, identity)
        case identity:
            return Row(number, prompt, response, text(identity, "column `id`"))


def text(value: object, where: str) -> str:
    """`value` where it is Unicode text.

    Raises:
        DataError: it is something else, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        kind = "missing" if value is None else type(value).__name__
        raise DataError(f"{where}: {kind}, expected a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: not Unicode text at character {error.start}") from None
    return value
