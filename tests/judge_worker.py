"""Labels planted comparisons in a process of its own, which a test may kill."""

import argparse
import json
from pathlib import Path

from cai_scale import constitution, endpoint
from cai_scale.critics import judge
from cai_scale.critics.judge import Settings
from judging import comparisons

endpoint.FIRST_PAUSE = 0.01  # seconds; the faults are many and the server is near


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url")
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--count", type=int)
    parser.add_argument("--deadline", type=float)
    parser.add_argument("--into", type=Path, help="the leans, in order")
    given = parser.parse_args()
    settings = Settings(
        url=given.url,
        mode="pairwise",
        principles="one",
        concurrency=64,
        deadline=given.deadline,
    )
    asked = judge.load(constitution.load(), settings, journal=given.journal, shown=False)
    planted = comparisons(given.count)
    found = asked.compare(
        [one.prompt for one in planted],
        [one.first for one in planted],
        [one.second for one in planted],
    )
    given.into.write_text(json.dumps([(one.lean, one.why) for one in found]))


if __name__ == "__main__":
    main()
