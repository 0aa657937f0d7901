"""`cai-score` and `cai-scale generate`: a bundle answers and scores. No torch."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cai_scale.commands import Parser, one_line
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.errors import DataError, MissingError
from cai_scale.records import canonical, read_jsonl
from cai_scale.runtime.bundle import open_bundle


@one_line
def score_main(arguments: Sequence[str] | None = None) -> int:
    """`cai-score`."""
    return score(arguments, prog="cai-score")


def score(arguments: Sequence[str] | None, prog: str = "cai-scale score") -> int:
    """Print one JSON object per response: principles, overall, the constitution's hash."""
    parser = _parser(prog, "Score an answer with a bundle's constitution.")
    parser.add_argument("--prompt", help="what was asked")
    parser.add_argument("--response", help="the answer to score")
    parser.add_argument("--input", help="a JSONL file with prompt and response; - reads stdin")
    options = parser.parse_args(arguments)
    if options.input is None and options.response is None:
        parser.error("give --prompt and --response, or --input FILE")
    if options.input is not None and options.response is not None:
        parser.error("give --response or --input, not both")
    constitution = open_bundle(options.bundle).constitution
    critic = LexiconCritic(constitution)
    for prompt, response in _scored(options):
        verdict = critic.score([prompt], [response])[0]
        # An empty response has no score.
        result: dict[str, Any] = {
            "principles": dict(verdict.principles) if verdict else None,
            "overall": verdict.overall if verdict else None,
            "constitution": constitution.sha256,
        }
        print(canonical(result), flush=True)
    return 0


def generate(arguments: Sequence[str] | None) -> int:
    """Print the answer to each prompt."""
    parser = _parser("cai-scale generate", "Answer prompts with a bundle's model.")
    parser.add_argument(
        "--prompt", action="append", required=True, help="a question; may be given several times"
    )
    parser.add_argument("--variant", help="fp32 or q8 (default: the bundle's own choice)")
    parser.add_argument("--max_new_tokens", type=_positive(int), help="longest answer, in tokens")
    parser.add_argument(
        "--temperature", type=_positive(float, zero=True), help="0 takes the likeliest token"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, another answer")
    options = parser.parse_args(arguments)
    from cai_scale.runtime.generate import Policy

    policy = Policy(open_bundle(options.bundle), options.variant)
    given = {
        key: getattr(options, key)
        for key in ("max_new_tokens", "temperature")
        if getattr(options, key) is not None
    }
    decoding = replace(policy.decoding, **given)
    conversations = [({"role": "user", "content": prompt},) for prompt in options.prompt]
    for answer in policy.answer(conversations, decoding, seed=options.seed):
        print(answer.text)
    return 0


def _parser(prog: str, description: str) -> Parser:
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--bundle", type=Path, required=True, help="a folder that cai-export wrote")
    return parser


def _scored(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    if options.input is None:
        yield options.prompt or "", options.response
        return
    path = Path("/dev/stdin" if options.input == "-" else options.input)
    if options.input != "-" and not path.is_file():
        raise MissingError(f"input {path} does not exist; name a JSONL file, or - for stdin")
    for row, record in read_jsonl(path):
        for column in ("prompt", "response"):
            if not isinstance(record.get(column), str):
                raise DataError(
                    f"{options.input}: row {row}, column `{column}`: {record.get(column)!r}: "
                    f"expected a text"
                )
        yield record["prompt"], record["response"]


def _positive(kind: type, *, zero: bool = False) -> Any:
    def number(text: str) -> Any:
        value = kind(text)
        if not (value > 0 or (zero and value == 0)) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
        return value

    number.__name__ = kind.__name__
    return number


if __name__ == "__main__":
    sys.exit(score_main())
