"""What the base model gives the pairs of a round, computed once and kept beside them. No torch.

These numbers depend on nothing that is trained. They are kept with a key of all that they do
depend on, and a file whose key does not fit is as good as none.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cai_scale.config import Config
from cai_scale.errors import DataError
from cai_scale.records import canonical, read_json, write_json

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Reference:
    """log π_ref of the two answers of a pair: sums over their tokens, in nats."""

    prompt_id: str
    chosen: float
    rejected: float


def key(
    config: Config,
    precision: str,
    weights: Mapping[str, str],
    tokens: Iterable[Sequence[Sequence[int]]],
) -> dict[str, Any]:
    """What decides the numbers.

    Args:
        precision: the number format in which the base model computes.
        weights: SHA-256 of each file of the base model's weights, by its name.
        tokens: the token ids of every pair: prompt, chosen and rejected. The tokenizer, the chat
            template and the pairs' texts decide these, and act on the numbers through them alone.
    """
    digest = hashlib.sha256()
    for ids in tokens:
        digest.update(canonical(ids).encode("utf-8"))
    return {
        "weights": dict(weights),
        "tokens": digest.hexdigest(),
        "max_length": config.max_length,
        "precision": precision,
        "qlora": config.qlora,
    }


def write(path: Path, key: Mapping[str, Any], references: Iterable[Reference]) -> None:
    """Keep the references of pairs, in the order of the pairs."""
    write_json(path, {"schema": SCHEMA, "key": key, "pairs": [asdict(r) for r in references]})


def read(path: Path, key: Mapping[str, Any]) -> list[Reference] | None:
    """What is kept there under this key; None where there is nothing, or something else."""
    with suppress(DataError):
        kept, references = content(path)
        if kept == key:
            return references
    return None


def content(path: Path) -> tuple[dict[str, Any], list[Reference]]:
    """The key and the references that a file holds.

    Raises:
        DataError: the file is not as it was written.
    """
    record = read_json(path)
    try:
        if record["schema"] != SCHEMA:
            raise KeyError("schema")
        return record["key"], [Reference(**row) for row in record["pairs"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not as it was written ({error}); restore the file") from None
