"""Choose tokens at random, the same way in torch and in onnxruntime. No torch.

A random number depends on (seed, round, prompt id, sample) and its position in the answer,
and on nothing else: not on the batch, the rank or the number of ranks.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are sampled.

    A temperature of 0 takes the most likely token. Otherwise a token is drawn from the `top_k`
    most likely ones, cut to the smallest set that holds `top_p` of their probability.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


def uniforms(
    seed: int, prompt_id: str, sample: int, count: int, *, round: int = 0
) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for one answer, from a counter-based generator (Philox)."""
    identity = f"{seed}\0{round}\0{prompt_id}\0{sample}".encode("utf-8", "surrogatepass")
    key = np.frombuffer(hashlib.sha256(identity).digest()[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def choose(
    logits: NDArray[np.float32],
    numbers: NDArray[np.float64],
    temperature: NDArray[np.float64],
    top_p: float,
) -> NDArray[np.int64]:
    """Invert the cumulative distribution of each row at its number.

    Args:
        logits: [rows, k], the k largest logits of each row in descending order.
        numbers: [rows], uniform in [0, 1).
        temperature: [rows], at least 0; 0 chooses column 0.
        top_p: in (0, 1].

    Returns:
        [rows], columns of `logits`.
    """
    scaled = logits.astype(np.float64) / np.where(temperature > 0, temperature, 1.0)[:, None]
    weights = np.exp(scaled - scaled[:, :1])
    cumulative = np.cumsum(weights, axis=1)
    total = cumulative[:, -1]
    # The nucleus: up to and including the first column at which `top_p` of the mass is reached.
    last = np.sum(cumulative < top_p * total[:, None], axis=1).clip(max=logits.shape[1] - 1)
    mass = np.take_along_axis(cumulative, last[:, None], axis=1)[:, 0]
    column = np.sum(cumulative <= (numbers * mass)[:, None], axis=1).clip(max=last)
    return np.where(temperature > 0, column, 0)


def top(logits: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """[rows, k], the columns of the k largest logits of [rows, vocabulary], descending.

    Equal logits, among those kept, stand in the order of the vocabulary.
    """
    k = min(k, logits.shape[1])
    if k == 1:
        return np.argmax(logits, axis=1)[:, None]
    columns = np.sort(np.argpartition(logits, -k, axis=1)[:, -k:], axis=1)
    order = np.argsort(-np.take_along_axis(logits, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)
