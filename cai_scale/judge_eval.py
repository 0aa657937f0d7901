"""`cai-scale judge-eval`: how well a critic agrees with labelled pairs.

What a critic is shown follows from the texts alone: swapping the labels of a file changes nothing
that it sees, so no effect of the order can pass for agreement.
"""

import argparse
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cai_scale import constitution as constitutions
from cai_scale.commands import Parser, require
from cai_scale.critics import NAMES, Comparer, Critic, flags
from cai_scale.errors import ConfigError, DataError, MissingError
from cai_scale.evaluation.agreement import LabelledPair, agreement, verdict
from cai_scale.records import Preference, canonical, read_jsonl, sha256, write_json, write_jsonl
from cai_scale.runtime.rows import text


def main(arguments: Sequence[str]) -> int:
    """`cai-scale judge-eval --data FILE --critic NAME`."""
    parser = Parser(
        prog="cai-scale judge-eval",
        description="Ask a critic about pairs of answers of which one is labelled the better: how "
        "often it agrees, whether it prefers the answer shown first or the longer one, whether "
        "it is right as often as it says, and what that costs.",
        epilog="example: cai-scale judge-eval --data pairs.jsonl --critic reward:runs/reward",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON Lines with prompt, chosen and rejected, and perhaps id, category and lang",
    )
    parser.add_argument(
        "--critic",
        default="lexicon",
        help=f"{', '.join(NAMES)}, or several with weights (default: %(default)s)",
    )
    parser.add_argument("--constitution", help="a YAML file (default: the bundled one)")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N pairs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="write a row for each pair there")
    flags.add(parser)
    options = parser.parse_args(arguments)
    require("judge-eval", "judge", "rich")
    _check(options)
    constitution = constitutions.load(options.constitution)
    pairs = read_pairs(options.data, options.limit)
    critic = flags.load(options.critic, options, constitution)
    started = time.perf_counter()
    preferences = ask(critic, pairs)
    seconds = time.perf_counter() - started
    summary = {
        "schema": 1,
        "data": str(options.data),
        "data_sha256": sha256(options.data),
        "critic": critic.name,
        "constitution": constitution.sha256,
        **agreement(pairs, preferences, compares=isinstance(critic, Comparer)),
        "cost": cost(critic, seconds),
    }
    if options.rows:
        write_jsonl(options.rows, map(_row, pairs, preferences))
    if options.json:
        write_json(options.json, summary)
    print_agreement(summary)
    return 0


def read_pairs(path: Path, limit: int | None = None) -> list[LabelledPair]:
    """The first `limit` pairs of a file, or all, each in an order that hangs on its texts alone.

    Raises:
        MissingError: there is no such file.
        DataError: it has no rows, or one of them is not a labelled pair; the row is named.
    """
    if not path.is_file():
        raise MissingError(
            f"--data {path}: no such file; name JSON Lines with prompt, chosen and rejected"
        )
    pairs = list(islice(_pairs(path), limit))
    if not pairs:
        raise DataError(f"{path}: no rows; write at least one with prompt, chosen and rejected")
    return pairs


def ask(critic: Critic | Comparer, pairs: Sequence[LabelledPair]) -> list[Preference]:
    """A critic's preference for each pair; one that only scores leans by the difference.

    Raises:
        DataError: a comparer gave too few or too many preferences, or one outside [-1, 1].
    """
    if isinstance(critic, Comparer):
        return _compared(critic, pairs)
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    responses = [answer for pair in pairs for answer in (pair.first, pair.second)]
    scores = critic.score(prompts, responses)
    preferences = []
    for pair, first, second in zip(pairs, scores[::2], scores[1::2], strict=True):
        if first is None or second is None:
            unscored = pair.first if first is None else pair.second
            preferences.append(Preference(None, critic.why(pair.prompt, unscored)))
        else:
            preferences.append(Preference(first.overall - second.overall))
    return preferences


def cost(critic: Critic | Comparer, seconds: float) -> dict[str, Any]:
    """The seconds, and what a critic says it has spent, where it has an attribute `spent`.

    That is a mapping to numbers, with any of calls, prompt_tokens, completion_tokens and money.
    """
    spent: Mapping[str, float] = getattr(critic, "spent", {})
    tokens = spent.get("prompt_tokens", 0) + spent.get("completion_tokens", 0)
    speed = {"tokens_per_second": round(tokens / seconds, 1)} if tokens else {}
    return {**spent, "seconds": round(seconds, 3), **speed}


def print_agreement(summary: Mapping[str, Any]) -> None:
    """Print the figures: shares with their intervals, the calibration, counts and cost."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=100)
    table: Table = Table(title=escape(f"{summary['critic']} on {summary['n']} labelled pairs"))
    for column in ("", "share", "95 % interval", "pairs"):
        table.add_column(column, justify="right" if column else "left")
    for section in _sections(summary):
        for title, share in section.items():
            table.add_row(escape(title), *_shown(share))
        table.add_section()
    console.print(table)
    if summary["calibration"]["bins"]:
        table = Table(title="is it right as often as its lean says?")
        for column in ("|lean|", "said", "was", "pairs"):
            table.add_column(column, justify="right")
        for bin in summary["calibration"]["bins"]:
            ends = f"{bin['from']:.1f} to {bin['to']:.1f}"
            table.add_row(ends, f"{bin['said']:.1%}", f"{bin['was']:.1%}", str(bin["n"]))
        console.print(table)
    for line in _lines(summary):
        console.print(line, markup=False, highlight=False)


def _check(options: argparse.Namespace) -> None:
    """Complain about settings before anything is asked, or written over."""
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit {options.limit}: expected at least 1")
    files = {flag: getattr(options, flag) for flag in ("data", "json", "rows")}
    given = {flag: path.resolve() for flag, path in files.items() if path is not None}
    if len(set(given.values())) < len(given):
        named = ", ".join(f"--{flag} {files[flag]}" for flag in given)
        raise ConfigError(f"{named}: two of them are one file; name another")


def _pairs(path: Path) -> Iterator[LabelledPair]:
    for row, record in read_jsonl(path):
        try:
            yield _pair(row, record)
        except DataError as error:
            raise DataError(f"{path}: row {row}: {error}") from None


def _pair(row: int, record: Mapping[str, Any]) -> LabelledPair:
    """A row's pair; its `id` is the row's number where it has none."""
    prompt, chosen, rejected = (
        text(record.get(key), f"column `{key}`") for key in ("prompt", "chosen", "rejected")
    )
    if chosen == rejected:
        raise DataError("`chosen` and `rejected` are the same text; remove the row")
    category, language = (
        text(record.get(key) or "", f"column `{key}`") for key in ("category", "lang")
    )
    identity = row if record.get("id") is None else record["id"]
    first, second = sorted((chosen, rejected), key=lambda answer: _place(prompt, answer))
    return LabelledPair(
        id=identity if isinstance(identity, int) else text(identity, "column `id`"),
        prompt=prompt,
        first=first,
        second=second,
        chosen_first=first == chosen,
        category=category,
        language=language,
    )


def _place(prompt: str, answer: str) -> str:
    return hashlib.sha256(canonical([prompt, answer]).encode("utf-8")).hexdigest()


def _compared(critic: Comparer, pairs: Sequence[LabelledPair]) -> list[Preference]:
    columns = ([getattr(pair, key) for pair in pairs] for key in ("prompt", "first", "second"))
    preferences = critic.compare(*columns)
    if len(preferences) != len(pairs):
        raise DataError(
            f"critic {critic.name} gave {len(preferences)} preferences for {len(pairs)} pairs; "
            f"mend it, or use another"
        )
    for pair, preference in zip(pairs, preferences, strict=True):
        if preference.lean is not None and not -1 <= preference.lean <= 1:  # so that a NaN fails
            raise DataError(
                f"critic {critic.name} gave the lean {preference.lean} for pair {pair.id}, "
                f"expected a number from -1 to 1; mend it, or use another"
            )
    return preferences


def _row(pair: LabelledPair, preference: Preference) -> dict[str, Any]:
    """A pair's line in `--rows`; a `lean` above 0 prefers the answer that was shown first."""
    return {
        "id": pair.id,
        "verdict": verdict(pair, preference),
        "lean": preference.lean,
        "why": preference.why,
        "chosen_first": pair.chosen_first,
    }


def _sections(summary: Mapping[str, Any]) -> Iterator[dict[str, Mapping[str, Any]]]:
    """The table's lines, in groups: a share by its title."""
    accuracy, position, length = (summary[key] for key in ("accuracy", "position", "length"))
    yield {
        "right, of the decided pairs": accuracy["decided"],
        "right, ties and abstentions as half": accuracy["all"],
    }
    disagree = position["orders_disagree"]
    yield {
        "prefers the answer shown first": position["prefers_first"],
        "the chosen is shown first": position["chosen_first"],
        **({"the orders disagree": disagree} if disagree else {}),
    }
    yield {
        "prefers the longer answer": length["prefers_longer"],
        "the chosen is longer": length["chosen_longer"],
        "right where the chosen is longer": length["accuracy_longer"],
        "right where the chosen is shorter": length["accuracy_shorter"],
    }
    for kind in ("categories", "languages"):
        yield {f"right, {name}": part["accuracy"] for name, part in summary[kind].items()}


def _shown(share: Mapping[str, Any]) -> tuple[str, str, str]:
    if share["share"] is None:
        return "–", "–", "0"
    low, high = share["ci95"]
    return f"{share['share']:.1%}", f"[{low:.1%}, {high:.1%}]", str(share["n"])


def _lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """What is no share: counts with their reasons, two figures, and the cost."""
    yield f"right {summary['right']}   wrong {summary['wrong']}"
    for kind in ("ties", "abstentions"):
        reasons = ", ".join(f"{why} {count}" for why, count in summary["reasons"][kind].items())
        yield f"{kind} {summary[kind]}" + (f": {reasons}" if reasons else "")
    for title, figure in (
        ("Spearman of lean and log length ratio", summary["length"]["spearman"]),
        ("expected calibration error", summary["calibration"]["ece"]),
    ):
        yield f"{title} " + ("–" if figure is None else f"{figure:.3f}")
    spent = summary["cost"].items()
    yield "cost: " + ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in spent)
