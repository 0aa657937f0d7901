"""The journal of a judge: every verdict once, kept as it comes, in one SQLite file.

A verdict is known by all that decides it: the constitution, the judge, the template of the
question, the prompt, and the answers in their order. A run that was killed finds what it has paid
for, and pays for nothing twice.
"""

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cai_scale.errors import DataError

_TABLE = """
CREATE TABLE IF NOT EXISTS verdicts (
    key TEXT PRIMARY KEY,
    constitution TEXT NOT NULL,
    judge TEXT NOT NULL,
    template TEXT NOT NULL,
    prompt TEXT NOT NULL,
    answers TEXT NOT NULL,
    verdict TEXT,
    why TEXT NOT NULL,
    calls INTEGER NOT NULL,
    tokens_in INTEGER NOT NULL,
    tokens_out INTEGER NOT NULL
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Subject:
    """All that decides a verdict: names, and texts as their SHA-256."""

    constitution: str
    judge: str
    template: str
    prompt: str
    answers: str

    @property
    def key(self) -> str:
        return digest("\0".join(astuple(self)))


@dataclass(frozen=True)
class Spent:
    """What was asked for so far."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            self.calls + other.calls,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
        )

    @property
    def tokens(self) -> int:
        return self.tokens_in + self.tokens_out


NOTHING = Spent()
LATE = "no reply in time"  # why there is no verdict yet


@dataclass(frozen=True)
class Verdict:
    """A number for each principle; None where the judge gave none, and why."""

    values: Mapping[str, float] | None
    why: str = ""
    spent: Spent = field(default=NOTHING, compare=False)


def digest(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Journal:
    """Verdicts by subject. One process writes it at a time; without a path it is kept in memory."""

    def __init__(self, path: Path | None = None) -> None:
        """The file is opened at the first use; a `DataError` then says that it is no journal."""
        self.path = path

    @cached_property
    def _file(self) -> sqlite3.Connection:
        try:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            file = sqlite3.connect(self.path or ":memory:", isolation_level=None, timeout=60)
            # Each verdict is committed by itself: a killed process loses none. The log beside the
            # file makes that cheap; only a power cut can take the last ones.
            file.execute("PRAGMA journal_mode=WAL")
            file.execute("PRAGMA synchronous=NORMAL")
            file.execute(_TABLE)
        except (sqlite3.Error, OSError) as error:
            raise DataError(
                f"{self.path} cannot be used as the journal of a judge ({error}); name another file"
            ) from None
        return file

    def get(self, subject: Subject) -> Verdict | None:
        """The verdict on a subject; None where it has not been given."""
        rows = self._run("SELECT verdict, why FROM verdicts WHERE key = ?", subject.key)
        return Verdict(rows[0][0] and json.loads(rows[0][0]), rows[0][1]) if rows else None

    def settled(self, subject: Subject) -> bool:
        """Whether a subject has its verdict, or will get none; a late reply may come yet."""
        found = self.get(subject)
        return found is not None and not found.why.startswith(LATE)

    def __len__(self) -> int:
        return int(self._run("SELECT count(*) FROM verdicts")[0][0])

    def put(self, subject: Subject, verdict: Verdict) -> None:
        """Keep a verdict; it stays, unless it was late. Raises `DataError` where it cannot be."""
        values = None if verdict.values is None else json.dumps(dict(verdict.values))
        counts = astuple(verdict.spent)
        self._run(
            "INSERT INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO "
            "UPDATE SET verdict = excluded.verdict, why = excluded.why, "
            "calls = calls + excluded.calls, tokens_in = tokens_in + excluded.tokens_in, "
            "tokens_out = tokens_out + excluded.tokens_out WHERE why LIKE ?",
            *(subject.key, *astuple(subject), values, verdict.why, *counts, f"{LATE}%"),
        )

    def spent(self, judge: str) -> Spent:
        """What all verdicts of a judge took."""
        query = "SELECT sum(calls), sum(tokens_in), sum(tokens_out) FROM verdicts WHERE judge = ?"
        return Spent(*(int(value or 0) for value in self._run(query, judge)[0]))

    def close(self) -> None:
        """Bring everything into the one file; what is kept in memory stays."""
        if self.path is not None and "_file" in self.__dict__:
            self._file.close()
            del self._file

    def _run(self, query: str, *values: object) -> list[Any]:
        try:
            return self._file.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise DataError(
                f"{self.path} cannot be read or written as the journal of a judge ({error}); free "
                f"some space, or restore it"
            ) from None
