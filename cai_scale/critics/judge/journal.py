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
    """Verdicts by key. One process writes it at a time; without a path it is kept in memory."""

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
        query = "SELECT verdict, why FROM verdicts WHERE key = ?"
        row = self._file.execute(query, (subject.key,)).fetchone()
        return row and Verdict(row[0] and json.loads(row[0]), row[1])

    def __contains__(self, subject: Subject) -> bool:
        query = "SELECT 1 FROM verdicts WHERE key = ?"
        return self._file.execute(query, (subject.key,)).fetchone() is not None

    def __len__(self) -> int:
        return int(self._file.execute("SELECT count(*) FROM verdicts").fetchone()[0])

    def put(self, subject: Subject, verdict: Verdict) -> None:
        """Keep a verdict; the first of a subject stays.

        Raises:
            DataError: the file cannot be written.
        """
        values = None if verdict.values is None else json.dumps(dict(verdict.values))
        counts = astuple(verdict.spent)
        try:
            self._file.execute(
                "INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (subject.key, *astuple(subject), values, verdict.why, *counts),
            )
        except sqlite3.Error as error:
            raise DataError(f"{self.path} cannot be written ({error}); free some space") from None

    def flush(self) -> None:
        """Bring everything from the log into the one file."""
        self._file.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        self._file.close()

    def spent(self) -> Spent:
        """What all verdicts in the journal took."""
        query = "SELECT sum(calls), sum(tokens_in), sum(tokens_out) FROM verdicts"
        return Spent(*(int(value or 0) for value in self._file.execute(query).fetchone()))
