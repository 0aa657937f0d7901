"""A judge over an endpoint: calls a second on one core, and memory over many comparisons.

The server is the scripted one of the tests, in a process of its own. At a concurrency of 64 and
an answer after 200 milliseconds, 320 calls a second are ideal.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import in_turn, write

from cai_scale import constitution
from cai_scale.critics import judge
from cai_scale.critics.judge import Judge, Settings

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from judging import Comparison, comparisons  # noqa: E402

CONCURRENCY, LATENCY, TURNS = 64, 0.2, 5
WARM, TIMED = 100, 3300  # comparisons a turn, two calls each
MANY, CHUNK = 50_000, 1000


@contextmanager
def serving(latency: float) -> Iterator[str]:
    command = [sys.executable, str(TESTS / "judge_server.py"), "--latency", str(latency)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.wait()


def make(url: str, folder: Path) -> Judge:
    settings = Settings(url=url, mode="pairwise", principles="one", concurrency=CONCURRENCY)
    journal = folder / f"{time.monotonic_ns()}.sqlite"
    return judge.load(constitution.load(), settings, journal=journal, shown=False)


def label(asked: Judge, planted: list[Comparison]) -> None:
    found = asked.compare(
        [one.prompt for one in planted],
        [one.first for one in planted],
        [one.second for one in planted],
    )
    assert [(p.lean or 0) > 0 for p in found] == [one.label > 0 for one in planted]


def calls_a_second(latency: float, folder: Path) -> float:
    """The labeller keeps to one core; the server starts before it does, and may take another."""
    planted, cores = comparisons(TIMED), os.sched_getaffinity(0)
    with serving(latency) as url:
        os.sched_setaffinity(0, {min(cores)})
        try:
            asked = make(url, folder)
            label(asked, planted[:WARM])  # libraries are loaded
            started = time.perf_counter()
            label(asked, planted[WARM:])
            return 2 * (TIMED - WARM) / (time.perf_counter() - started)
        finally:
            os.sched_setaffinity(0, cores)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(folder: Path) -> dict[int, int]:
    """Bytes held after so many comparisons."""
    found = {}
    with serving(0.0) as url:
        asked = make(url, folder)
        for chunk in range(MANY // CHUNK):
            label(asked, comparisons(CHUNK, seed=chunk))
            found[(chunk + 1) * CHUNK] = resident()
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rates = in_turn(
            {
                "200 ms": lambda: calls_a_second(LATENCY, folder),
                "at once": lambda: calls_a_second(0.0, folder),
            },
            TURNS,
        )
        held = memory(folder)
    write({"rates": rates, "ideal": CONCURRENCY / LATENCY, "memory": held})


if __name__ == "__main__":
    main()
