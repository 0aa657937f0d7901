"""`cai-score`: answers in, scores out, a stream of any length in constant memory. No torch."""

import argparse
import contextlib
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from cai_scale import constitution as constitutions
from cai_scale.commands import Parser, complain
from cai_scale.errors import DataError, MissingError
from cai_scale.records import canonical
from cai_scale.runtime.bundle import open_bundle
from cai_scale.runtime.rows import BadRow, Row, read_rows, text
from cai_scale.runtime.scorer import Scorer

# With a reward model, which is faster on many rows: as many at once, or of so many characters.
CHUNK_ROWS, CHUNK_CHARACTERS = 64, 4_000_000

DESCRIPTION = """\
Score answers with a bundle's or a constitution's lexicon, and with the bundle's reward model
where it has one. Prints one JSON object a line:

  principles, overall  the lexicon's scores in [0, 1]; null for an empty answer
  constitution         its SHA-256
  scorer               "reward" where the bundle has a reward model, else "lexicon"
  reward               with a reward model: its overall, and its principles if it scores each
  words                with --explain: each term that moved the lexicon's score, with its
                       principle, list, effect and place (characters, from start to end)

--input reads JSON Lines with the columns prompt and response, and id (a text or a whole number),
which is passed on. Every line that is not blank brings one line out, in order. A row that cannot
be scored brings {"row": N, "error": "..."}; others go on, and the exit code is 1. Rows are
answered one by one, and with a reward model up to 64 at a time.
"""


def score(arguments: Sequence[str] | None = None, prog: str = "cai-scale score") -> int:
    """Print a score for each answer; return the exit code."""
    parser = Parser(
        prog=prog,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_bundle(
        instead="--constitution", help="a YAML file, or 'default'; scores with its lexicon alone"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--response", help="the answer to score")
    source.add_argument("--input", help="a JSONL file with prompt and response; - reads stdin")
    parser.add_argument("--prompt", help="what was asked, beside --response")
    parser.add_argument("--explain", action="store_true", help="name the words behind a score")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row")
    options = parser.parse_args(arguments)
    if options.input is not None and options.prompt is not None:
        parser.error("give --prompt with --response, not with --input")
    if options.constitution is not None and options.expect_sha256 is not None:
        parser.error("give --expect-sha256 with --bundle, not with --constitution")

    scorer = _scorer(options)
    if options.input is None:
        prompt = text(options.prompt or "", "--prompt")
        rows: Iterable[Row | BadRow] = [Row(0, prompt, text(options.response, "--response"))]
        return _print_scores(rows, scorer, options)
    with _open(options.input) as file:
        return _print_scores(read_rows(file), scorer, options)


def _scorer(options: argparse.Namespace) -> Scorer:
    if options.constitution is not None:
        name = options.constitution
        return Scorer(constitutions.load(None if name == "default" else name))
    bundle = open_bundle(options.bundle, options.expect_sha256)
    return Scorer(bundle.constitution, bundle)


def _open(name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    if name == "-":
        return contextlib.nullcontext(sys.stdin.buffer if sys.stdin else io.BytesIO())
    try:
        return Path(name).open("rb")
    except FileNotFoundError:
        raise MissingError(
            f"input {name} does not exist; name a JSONL file, or - for stdin"
        ) from None


def _print_scores(rows: Iterable[Row | BadRow], scorer: Scorer, options: argparse.Namespace) -> int:
    total, bad, first = 0, 0, None
    for chunk in _chunks(rows, CHUNK_ROWS if scorer.reward else 1):
        for outcome in _outcomes(chunk, scorer, explain=options.explain):
            total += 1
            if isinstance(outcome, BadRow):
                if options.strict or options.input is None:
                    raise DataError(_complaint(options.input, outcome))
                bad += 1
                first = first or outcome
                record: dict[str, Any] = {"row": outcome.number, "error": outcome.error}
            else:
                record = outcome
            sys.stdout.buffer.write(canonical(record).encode("utf-8") + b"\n")
        sys.stdout.buffer.flush()
    if first is None:
        return 0
    return complain(f"{_complaint(options.input, first)}; {bad} of {total} rows have no score", 1)


def _complaint(source: str | None, bad: BadRow) -> str:
    if source is None:
        return bad.error
    return f"{'stdin' if source == '-' else source}: row {bad.number}: {bad.error}"


def _chunks(rows: Iterable[Row | BadRow], longest: int) -> Iterator[list[Row | BadRow]]:
    chunk: list[Row | BadRow] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row.prompt) + len(row.response) if isinstance(row, Row) else 0
        if len(chunk) == longest or characters > CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _outcomes(
    chunk: Sequence[Row | BadRow], scorer: Scorer, *, explain: bool
) -> Iterator[dict[str, Any] | BadRow]:
    """What each row of a chunk brings, in order."""
    scored = iter(_score([row for row in chunk if isinstance(row, Row)], scorer, explain=explain))
    for row in chunk:
        yield row if isinstance(row, BadRow) else next(scored)


def _score(rows: Sequence[Row], scorer: Scorer, *, explain: bool) -> list[dict[str, Any] | BadRow]:
    """All rows at once, or, where the reward model refuses one, one by one."""
    try:
        records = scorer.score(
            [row.prompt for row in rows], [row.response for row in rows], explain=explain
        )
    except DataError as error:
        if len(rows) == 1:
            return [BadRow(rows[0].number, str(error))]
        return [outcome for row in rows for outcome in _score([row], scorer, explain=explain)]
    named = ({} if row.id is None else {"id": row.id} for row in rows)
    return [name | record for name, record in zip(named, records, strict=True)]
