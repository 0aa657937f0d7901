"""The lexicon critic: megabytes of text a second on one core, and whether time is linear."""

import statistics
import time
from collections.abc import Callable

from common import write

from cai_scale import constitution, prompts
from cai_scale.critics.lexicon import LexiconCritic

ROUNDS = 5


def processor_seconds(work: Callable[[], object]) -> float:
    found = []
    for _ in range(ROUNDS):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return statistics.median(found)


def main() -> None:
    critic = LexiconCritic(constitution.load())
    asked = prompts.load("train")
    texts = {
        "English": " ".join(p.text for p in asked if p.language == "en"),
        "Vietnamese": " ".join(p.text for p in asked if p.language == "vi"),
        "both": " ".join(p.text for p in asked),
    }
    result: dict[str, object] = {}
    for name, text in texts.items():
        rates = {}
        for megabytes in (1, 10):
            size = megabytes * 1_000_000
            long = (
                (text * (size // len(text.encode()) + 1)).encode()[:size].decode("utf-8", "ignore")
            )
            rates[f"{megabytes} MB"] = megabytes / processor_seconds(
                lambda long=long: critic.score([""], [long])
            )
        result[name] = rates
    write(result)


if __name__ == "__main__":
    main()
