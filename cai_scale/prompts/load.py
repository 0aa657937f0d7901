"""Read prompts from JSONL, CSV, Parquet or a `datasets` name, checked row by row."""

import csv
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from cai_scale.errors import DataError, MissingError
from cai_scale.records import Message, Prompt, canonical, read_jsonl

TRAIN = "train"
HELDOUT = "heldout"
ROLES = ("system", "user", "assistant")
MAX_CHARACTERS = 200_000


def load(source: str) -> list[Prompt]:
    """Read prompts in order.

    Args:
        source: "train" or "heldout" (bundled), a .jsonl, .csv or .parquet file, or the name of
            a dataset on a hub (`owner/name`, optionally `owner/name:split`). Rows have a
            `prompt` text or `messages` (a list of role and content, ending with the user's),
            and may have `id`, `language` and `category`.

    Raises:
        MissingError: the file does not exist.
        DataError: the file is empty or malformed; the row and column are named.
    """
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for row, record in _rows(source):
        prompt = _prompt(source, row, record)
        if prompt.id in seen:
            _fail(source, row, "id", prompt.id, f"row {seen[prompt.id]} has it; ids must differ")
        seen[prompt.id] = row
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{source}: no rows; write at least one with a `prompt` column")
    return prompts


def digest(prompts: Sequence[Prompt]) -> str:
    """The SHA-256 of the prompts, whatever file they were read from."""
    lines = "\n".join(canonical(asdict(prompt)) for prompt in prompts)
    return hashlib.sha256(lines.encode()).hexdigest()


def _rows(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if source in (TRAIN, HELDOUT):
        path = resources.files("cai_scale.prompts").joinpath(f"{source}.jsonl")
        with resources.as_file(path) as file:
            yield from read_jsonl(file)
        return
    path = Path(source)
    if _is_file_name(source) and not path.is_file():
        raise MissingError(
            f"prompts file {source} does not exist; name a .jsonl, .csv or .parquet file"
        )
    if path.suffix == ".jsonl":
        yield from read_jsonl(path)
    elif path.suffix == ".csv":
        yield from _csv_rows(path)
    elif path.suffix == ".parquet":
        yield from enumerate(_dataset("parquet", data_files=source, split="train"), 1)
    elif _is_file_name(source):
        raise DataError(f"prompts file {source}: unknown kind; use .jsonl, .csv or .parquet")
    else:
        name, _, split = source.partition(":")
        yield from enumerate(_dataset(name, split=split or "train"), 1)


def _is_file_name(source: str) -> bool:
    if Path(source).exists() or Path(source).suffix in (".jsonl", ".json", ".csv", ".parquet"):
        return True
    return source.count("/") != 1 or source.startswith((".", "/", "~"))


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(MAX_CHARACTERS * 4)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row, record in enumerate(csv.DictReader(file, strict=True), 2):
                if None in record:
                    raise DataError(
                        f"{path}: row {row}: more cells than the header has columns; quote cells "
                        f"that hold commas"
                    )
                yield row, {key: value for key, value in record.items() if value}
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: not CSV ({error}); mend the file") from None


def _dataset(name: str, **options: Any) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingError(
            f"prompts {name} need the datasets library; pip install 'cai-scale[train]'"
        ) from None
    try:
        return datasets.load_dataset(name, **options)
    except Exception as error:  # whatever a reader or the hub's client raises
        shown = options.get("data_files", name)
        raise DataError(
            f"prompts {shown} cannot be read ({type(error).__name__}: {error}); check the name"
        ) from None


def _prompt(source: str, row: int, record: dict[str, Any]) -> Prompt:
    if "messages" in record:
        messages = _messages(source, row, record["messages"])
    elif "prompt" in record:
        text = _text(source, row, "prompt", record["prompt"])
        messages = ({"role": "user", "content": text},)
    else:
        raise DataError(
            f"{source}: row {row}: no column `prompt` or `messages` among "
            f"{', '.join(map(repr, record)) or 'none'}; rename the column"
        )
    language, category = record.get("language", "en"), record.get("category", "")
    for column, value in (("language", language), ("category", category)):
        if not isinstance(value, str):
            _fail(source, row, column, value, "expected text")
        _readable(source, row, column, value)
    identity = record.get("id")
    _readable(source, row, "id", str(identity))
    if identity is None:
        digest = hashlib.sha256(canonical(messages).encode("utf-8", "surrogatepass"))
        identity = f"{row}-{digest.hexdigest()[:8]}"
    return Prompt(id=str(identity), messages=messages, language=language, category=category)


def _messages(source: str, row: int, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        _fail(source, row, "messages", value, "expected a list of {role, content}")
    messages = []
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            _fail(source, row, "messages", message, f"expected a role among {', '.join(ROLES)}")
        content = _text(source, row, "messages", message.get("content"))
        messages.append({"role": message["role"], "content": content})
    if messages[-1]["role"] != "user":
        _fail(source, row, "messages", messages[-1]["role"], "the last message must be the user's")
    return tuple(messages)


def _text(source: str, row: int, column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        _fail(source, row, column, value, "expected a text that is not empty")
    if len(value) > MAX_CHARACTERS:
        _fail(source, row, column, value, f"longer than {MAX_CHARACTERS} characters; shorten it")
    _readable(source, row, column, value)
    return str(value)


def _readable(source: str, row: int, column: str, value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        _fail(source, row, column, value, f"lone surrogate at character {error.start}; remove it")
    if "\0" in value:
        _fail(source, row, column, value, "holds a NUL character; remove it")


def _fail(source: str, row: int, column: str, value: object, expected: str) -> None:
    shown = repr(value)
    shown = ascii(value) if not shown.isprintable() else shown
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise DataError(f"{source}: row {row}, column `{column}`: {shown}: {expected}")
