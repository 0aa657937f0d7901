"""Time the 8-bit reward scorer against torch in fp32, on texts of mixed length, in turn.

    python benchmarks/scorer.py --json OUT

No reward model has been trained yet, so one is made: the default model, with a head fitted by
ridge regression from its last token's state to the lexicon's score of a prompt and response.
Responses are put together from bundled prompts and the lexicon's terms. Torch gets what
onnxruntime gets: the same tokens, in batches of like length, padded to the right, at the batch
size that is best for it.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

MODEL = "smollm2-135m-q4"
FITTED, TIMED = 384, 256  # texts
RIDGE = 100.0
REPEATS = 5
LIMITS = (512, 2048, 8192)  # tokens of a batch with its padding; the best of them is timed
Score = Callable[[Sequence[Sequence[int]], int], np.ndarray]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the figures are written")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--texts", type=int, default=TIMED)
    parser.add_argument("--threads", type=int, help="of torch; onnxruntime follows OMP settings")
    options = parser.parse_args()
    figures = measure(options.texts, options.repeats)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", "utf-8")
    return 0
