"""Choose tokens at random, the same way in torch and in onnxruntime. No torch.

A random number depends on (seed, round, prompt id, sample) and its position in the answer,
and on nothing else: not on the batch, the rank or the number of ranks.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cai_scale.errors import ConfigError

COLDEST = 1e-6  # lower temperatures choose as this one does, without an overflow
Floats = float | NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are sampled.

    A temperature of 0 takes the most likely token. Otherwise a token is drawn from the `top_k`
    most likely ones, cut to the smallest set that holds `top_p` of their probability and to
    those at least `min_p` times as likely as the likeliest. A `repetition_penalty` above 1 makes
    tokens of the prompt and the answer so far less likely (Keskar et al., 2019, CTRL, section
    4.1). The answer ends before the first of the `stop` strings.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bounds = {
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 1,
            "max_new_tokens": self.max_new_tokens >= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
            "stop": all(self.stop),
        }
        for name, inside in bounds.items():
            value = getattr(self, name)
            if not inside or (isinstance(value, float) and not np.isfinite(value)):
                raise ConfigError(f"{name}: {value!r} is out of range; see --help")


def identity(seed: int, prompt_id: str, sample: int, *, round: int = 0) -> bytes:
    """32 bytes that stand for one answer, as if drawn at random."""
    parts = f"{seed}\0{round}\0{prompt_id}\0{sample}"
    return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).digest()


def uniforms(
    seed: int, prompt_id: str, sample: int, count: int, *, round: int = 0
) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for one answer, from a counter-based generator (Philox)."""
    key = np.frombuffer(identity(seed, prompt_id, sample, round=round)[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def choose(
    logits: NDArray[np.float32],
    numbers: NDArray[np.float64],
    temperature: NDArray[np.float64],
    top_p: Floats,
    *,
    top_k: NDArray[np.int64] | None = None,
    min_p: Floats = 0.0,
) -> NDArray[np.int64]:
    """Invert the cumulative distribution of each row at its number.

    Args:
        logits: [rows, k], the k largest logits of each row in descending order.
        numbers: [rows], uniform in [0, 1).
        temperature: [rows], at least 0; 0 chooses column 0.
        top_p: in (0, 1], one for all or [rows].
        top_k: [rows], at least 1: how many of the k columns count; all of them where None.
        min_p: in [0, 1], one for all or [rows].

    Returns:
        [rows], columns of `logits`.
    """
    warmth = np.where(temperature > 0, np.maximum(temperature, COLDEST), 1.0)
    scaled = logits.astype(np.float64) / warmth[:, None]
    weights = np.exp(scaled - scaled[:, :1])
    if top_k is not None:
        weights[np.arange(logits.shape[1]) >= top_k[:, None]] = 0.0
    # The likeliest has weight 1; later columns weigh less, so a cut leaves a prefix.
    weights[weights < np.reshape(min_p, (-1, 1))] = 0.0
    cumulative = np.cumsum(weights, axis=1)
    # The nucleus: up to and including the first column at which `top_p` of the mass is reached.
    mass_wanted = np.reshape(top_p, (-1, 1)) * cumulative[:, -1:]
    last = np.sum(cumulative < mass_wanted, axis=1).clip(max=logits.shape[1] - 1)
    mass = np.take_along_axis(cumulative, last[:, None], axis=1)[:, 0]
    column = np.sum(cumulative <= (numbers * mass)[:, None], axis=1).clip(max=last)
    return np.where(temperature > 0, column, 0)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """The log-probabilities of one row's logits, [vocabulary]."""
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def penalise(logits: NDArray[np.float32], seen: Sequence[int], penalty: float) -> None:
    """Make the tokens in `seen` less likely, in place; `logits` is one row, [vocabulary]."""
    tokens = np.unique(np.asarray(seen, np.int64))
    values = logits[tokens]
    logits[tokens] = np.where(values > 0, values / penalty, values * penalty)


def top(logits: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """[rows, k], the columns of the k largest logits of [rows, vocabulary], descending.

    Equal logits, among those kept, stand in the order of the vocabulary.
    """
    k = min(k, logits.shape[1])
    if k == 1:
        return np.argmax(logits, axis=1)[:, None]
    columns = np.sort(np.argpartition(logits, -k, axis=1)[:, -k:], axis=1)
    order = np.argsort(-np.take_along_axis(logits, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)
