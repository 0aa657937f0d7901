"""How likely answers are under the base model, and how far a policy has moved from it. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cai_scale.records import Message

ROWS = 32  # tokens whose probabilities exist at once; so many stay in a processor's cache

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]


class Reader(Protocol):
    """A language model that reads an answer somebody gave."""

    def read(self, messages: Sequence[Message], answer: str) -> tuple[Ids, Logits]:
        """The answer's tokens, [tokens], and the logits that foretell each, [tokens, vocabulary].

        The tokens are those of the text alone: neither what ends an answer nor what a template
        writes around it is among them.
        """
        ...


@dataclass(frozen=True)
class Likelihood:
    """Means over an answer's `tokens`, in nats: see `kl_and_nll`; None for an empty answer, or
    where no policy was asked."""

    nll: float | None
    kl: float | None
    tokens: int


def likelihood(
    messages: Sequence[Message], answer: str, base: Reader, policy: Reader | None
) -> Likelihood:
    """Read an answer by the base model and, where there is one, by the policy that gave it.

    Args:
        policy: has the tokens of the base model; it may be the base model itself.
    """
    if not answer.strip():
        return Likelihood(None, None, 0)
    ids, logits = base.read(messages, answer)
    if not len(ids):  # what the tokenizer drops, such as a lone zero-width space
        return Likelihood(None, None, 0)
    moved = None
    if policy is not None:
        moved = logits if policy is base else policy.read(messages, answer)[1]
    kl, nll = kl_and_nll(moved, logits, ids)
    return Likelihood(nll, kl, len(ids))


def kl_and_nll(policy: Logits | None, base: Logits, ids: Ids) -> tuple[float | None, float]:
    """The mean over tokens of KL(policy‖base) = Σ_v p_v (log p_v - log q_v), over the whole
    vocabulary, and of -log q of the token that stands there; in nats.

    Args:
        policy, base: logits, [tokens, vocabulary]; without the policy's there is no KL.
        ids: [tokens].
    """
    nll = kl = 0.0
    for start in range(0, len(ids), ROWS):
        part = slice(start, start + ROWS)
        log_q = _log_softmax(base[part])
        nll -= float(np.take_along_axis(log_q, ids[part, None], axis=1).sum(dtype=np.float64))
        if policy is not None and policy is not base:
            log_p = _log_softmax(policy[part])
            kl += float((np.exp(log_p) * (log_p - log_q)).sum(dtype=np.float64))
    # Rounding may bring a sum that is never negative a little under 0.
    return None if policy is None else max(0.0, kl / len(ids)), nll / len(ids)


def _log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max(axis=1, keepdims=True)
    total: Logits = np.exp(shifted).sum(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(total), np.float32)
