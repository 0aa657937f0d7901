"""The records that stages exchange, and JSON Lines files that are whole or absent. No torch."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from cai_scale.errors import ConfigError, DataError

Message = dict[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """A critic's verdict: a score per principle and the weighted mean, each in [0, 1].

    `principles` is empty where a critic gives the mean alone. `votes` holds what each of several
    critics gave overall, by its name; it is empty where there is one.
    """

    principles: Mapping[str, float]
    overall: float
    votes: Mapping[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As a record: what `Score(**record)` takes."""
        votes = {"votes": dict(self.votes)} if self.votes else {}
        return {"principles": dict(self.principles), "overall": self.overall, **votes}


@dataclass(frozen=True)
class Preference:
    """A critic's verdict on two answers to one prompt.

    `lean` is in [-1, 1]: above 0 where the first is better, 0 for a tie, None for an abstention.
    `why` says what made it a tie or an abstention, where something did. `principles` holds the
    lean by each principle that was asked about.
    """

    lean: float | None
    why: str = ""
    principles: Mapping[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As a record: what `Preference(**record)` takes."""
        return {"lean": self.lean, "why": self.why, "principles": dict(self.principles)}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A conversation that waits for an answer; the last message is the user's."""

    id: str
    messages: tuple[Message, ...]
    language: str = "en"
    category: str = ""

    @property
    def text(self) -> str:
        """The user's last message."""
        return self.messages[-1]["content"]


@dataclass(frozen=True, kw_only=True)
class Response:
    """One sampled answer, with all that its randomness depended on.

    `tokens` counts generated tokens; `finished` says whether the model ended the answer itself.
    """

    prompt_id: str
    sample: int
    round: int
    temperature: float
    text: str
    tokens: int
    finished: bool
    revised: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer with its natural log-probability, at most 0.

    `top` holds the likeliest tokens in its place and theirs, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """A generated text, its length in tokens, and whether the model ended it itself.

    `ids` are the tokens as they were drawn, the one that ended the answer included; None where
    the sampler does not see them, as with a server. `logprobs` has one item for each of `tokens`,
    None where they were not asked for. Neither is stored.
    """

    text: str
    tokens: int
    finished: bool
    ids: tuple[int, ...] | None = field(default=None, compare=False, repr=False)
    logprobs: tuple[TokenLogprob, ...] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A prompt, an answer to it, and the critic's score of that."""

    prompt: Prompt
    response: Response
    score: Score


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An answer as it stands in a pair; `principles` and `votes` are those of its `Score`."""

    text: str
    score: float
    temperature: float
    revised: bool
    principles: Mapping[str, float] = field(default_factory=dict)
    votes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt, the chosen scored higher than the rejected."""

    prompt_id: str
    language: str
    messages: tuple[Message, ...]
    chosen: Candidate
    rejected: Candidate


def exchange(prompt: str, response: str) -> tuple[Message, Message]:
    """What critics and reward models read: the user's last message, and the answer to it."""
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": response}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(digests: Mapping[str, str]) -> str:
    """The text of a file of SHA-256s by name, as `sha256sum --check` reads it."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def canonical(record: object) -> str:
    """One line of JSON: readable Unicode, no NaN."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object that `content` holds.

    Raises:
        DataError: it is not UTF-8 or not a JSON object; the caller says where it stands.
    """
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error}); mend it") from None
    if not isinstance(value, dict):
        raise DataError(f"{type(value).__name__}, expected an object")
    return value


def read_jsonl(path: Path, *, torn_tail: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, object) for every line that is not blank.

    With `torn_tail`, a last line without its newline is what a killed writer left, and ends
    the file quietly.

    Raises:
        DataError: a line is not UTF-8 or not a JSON object; the row is named.
    """
    try:
        lines = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); restore the file") from None
    with lines:
        for row, raw in enumerate(lines, 1):
            if torn_tail and not raw.endswith(b"\n"):
                return
            if not raw.strip():
                continue
            try:
                value = parse_object(raw)
            except DataError as error:
                raise DataError(f"{path}: row {row}: {error}") from None
            yield row, value


def read_records(path: Path, build: Callable[[dict[str, Any]], T]) -> list[T]:
    """What `build` makes of every row of a file that this project wrote.

    Raises:
        DataError: a row has other keys than it was written with.
    """
    built = []
    for row, record in read_jsonl(path):
        try:
            built.append(build(record))
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path}: row {row}: not as it was written ({error}); restore the file"
            ) from None
    return built


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Write dataclasses or dicts, one a line; the file appears whole or not at all."""
    with replacing(path) as file:
        for record in records:
            file.write(canonical(record if isinstance(record, dict) else asdict(record)) + "\n")


def write_json(path: Path, value: object) -> None:
    """Write indented JSON; the file appears whole or not at all."""
    with replacing(path) as file:
        file.write(json_text(value))


def json_text(value: object) -> str:
    """Indented JSON, as files hold it: readable Unicode, no NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a file that this project wrote.

    Raises:
        DataError: the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); restore the file") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A text file written aside, synced, and renamed to `path` when the block succeeds."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); choose another output folder"
        ) from None
    finally:
        aside.unlink(missing_ok=True)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
