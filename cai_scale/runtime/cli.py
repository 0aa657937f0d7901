"""`cai-score`. No torch."""

import sys
from collections.abc import Sequence

from cai_scale.commands import one_line
from cai_scale.runtime.score import score


@one_line
def score_main(arguments: Sequence[str] | None = None) -> int:
    """`cai-score`."""
    return score(arguments, prog="cai-score")


if __name__ == "__main__":
    sys.exit(score_main())
