"""What the benchmarks share: the exported default model, in turn, medians, one JSON a part."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-q4"
BUNDLE = Path("runs/bench-policy")


def policy_bundle() -> Any:
    """The default model in fp32, 8 and 4 bits, exported at the first need and kept in runs/."""
    from cai_export.policy import export_policy

    from cai_scale import constitution
    from cai_scale.runtime.bundle import MANIFEST, open_bundle

    if not (BUNDLE / MANIFEST).is_file():
        export_policy(MODEL, None, BUNDLE, ("fp32", "q8", "q4"), constitution.load())
    return open_bundle(BUNDLE)


def in_turn(
    contestants: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, dict[str, Any]]:
    """Measure each contestant once a round, one after the other, so that all meet the same
    machine; return each one's median and all its values."""
    values: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, measure in contestants.items():
            values[name].append(measure())
    return {
        name: {"median": statistics.median(found), "values": found}
        for name, found in values.items()
    }


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def write(result: Mapping[str, Any]) -> None:
    """Print the figures, or write them where `--json FILE` says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    path = parser.parse_args().json
    text = json.dumps(result, indent=2)
    if path is None:
        print(text)
    else:
        path.write_text(text + "\n", "utf-8")
