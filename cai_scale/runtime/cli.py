"""`cai-score` and `cai-scale generate`: a bundle answers and scores. No torch."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cai_scale.commands import Parser, one_line
from cai_scale.runtime.bundle import open_bundle
from cai_scale.runtime.score import score


@one_line
def score_main(arguments: Sequence[str] | None = None) -> int:
    """`cai-score`."""
    return score(arguments, prog="cai-score")


def generate(arguments: Sequence[str] | None) -> int:
    """Print the answer to each prompt."""
    parser = Parser(
        prog="cai-scale generate",
        description="Answer prompts with a bundle's model.",
        allow_abbrev=False,
    )
    parser.add_bundle()
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

    policy = Policy(open_bundle(options.bundle, options.expect_sha256), options.variant)
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
