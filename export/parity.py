"""The gate: an exported graph must answer as the trained model does, or there is no bundle."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cai_scale.errors import GateError
from cai_scale.runtime.bundle import Bundle
from cai_scale.runtime.generate import Policy
from cai_scale.runtime.graph import Graph

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .merge import Merged

Array = NDArray[Any]

MAX_DELTA = 1e-3  # of a logit, fp32 against torch
MAX_KL = 0.02  # nats a token, quantised against torch
MIN_TOP1 = 0.95
MIN_TOKENS = 2000
BATCH = 6
ANSWER = 16  # tokens of greedy search, bundle against torch
STEPS = 4  # tokens decoded one at a time, at the end of each sequence


@dataclass(frozen=True)
class Case:
    """How the rows of a batch lie: alone, or together and padded on one side."""

    name: str
    rows: int
    left: bool


CASES = (Case("alone", 1, True), Case("left", BATCH, True), Case("right", BATCH, False))


def reference(model: "PreTrainedModel", sequence: Sequence[int]) -> Array:
    """The torch model's logits for one sequence by itself: [tokens, vocabulary], float32."""
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(sequence)])).logits[0].float().numpy()


def check_exact(
    path: Path, model: "PreTrainedModel", sequences: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Compare the fp32 graph with torch: alone and padded on either side, prefill and decode.

    Raises:
        GateError: a logit differs by more than `MAX_DELTA`.
    """
    graph = Graph(path)
    expected = [reference(model, sequence) for sequence in sequences]
    deltas = {case.name: _compare(graph, sequences, expected, case) for case in CASES}
    # numpy's max, unlike Python's, lets a NaN through, and the comparison below then fails.
    worst = float(np.max([list(modes.values()) for modes in deltas.values()]))
    if not worst <= MAX_DELTA:
        raise GateError(
            f"the fp32 graph differs from torch by {worst:.2e} in a logit, over {MAX_DELTA:.0e}: "
            f"{deltas}; no bundle was written"
        )
    return {"max_abs_logit_delta": deltas, "bound": MAX_DELTA, "sequences": len(sequences)}


def check_close(
    path: Path, model: "PreTrainedModel", sequences: Sequence[Sequence[int]], name: str
) -> dict[str, Any]:
    """Compare a quantised graph with torch over all tokens, and a row alone with the same row
    in a padded batch.

    Raises:
        GateError: a bound does not hold, or there are too few tokens to say.
    """
    graph = Graph(path)
    divergences, agreements = [], []
    for sequence in sequences:
        kl, top1 = divergence(reference(model, sequence), _alone(graph, sequence))
        divergences.append(kl)
        agreements.append(top1)
    kl, top1 = np.concatenate(divergences), np.concatenate(agreements)
    mean_kl, agreement = float(kl.mean()), float(top1.mean())
    figures: dict[str, Any] = {
        "tokens": len(kl),
        "kl": mean_kl,
        "kl_max": float(kl.max()),
        "top1": agreement,
        "alone_against_batch": _batch_effect(graph, sequences[:BATCH]),
        "bounds": {"kl": MAX_KL, "top1": MIN_TOP1, "tokens": MIN_TOKENS},
    }
    if not figures["alone_against_batch"] <= MAX_DELTA:
        raise GateError(
            f"variant {name}: a row's logits change by {figures['alone_against_batch']:.2e} in a "
            f"batch, over {MAX_DELTA:.0e}; no bundle was written"
        )
    if len(kl) < MIN_TOKENS:
        raise GateError(f"{len(kl)} tokens are too few for parity, under {MIN_TOKENS}")
    if not mean_kl <= MAX_KL or not agreement >= MIN_TOP1:
        raise GateError(
            f"variant {name}: KL {mean_kl:.4f} (at most {MAX_KL}), top-1 agreement "
            f"{agreement:.4f} (at least {MIN_TOP1}); no bundle was written"
        )
    return figures


def check_answers(bundle: Bundle, merged: "Merged", texts: Sequence[str]) -> None:
    """Read prompts, and answer the last, as the bundle's user does: template, tokens, search.

    Raises:
        GateError: the runtime reads a prompt otherwise than the trained model's tokenizer, or
            greedy search gives another answer.
    """
    import torch

    policy = Policy(bundle, "fp32")
    for text in texts:
        messages = [{"role": "user", "content": text}]
        tokens = merged.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        if policy.chat.encode(messages) != list(tokens):
            raise GateError(f"the runtime reads {text[:40]!r} otherwise than the tokenizer")
    ids = torch.tensor([list(tokens)])
    with torch.inference_mode():
        output = merged.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=ANSWER
        )[0, len(tokens) :]
    greedy = replace(policy.decoding, temperature=0.0, max_new_tokens=ANSWER)
    found = policy.answer([messages], greedy)[0].text
    if found != merged.tokenizer.decode(output, skip_special_tokens=True).strip():
        raise GateError(f"the bundle answers {text[:40]!r} otherwise than the trained model")


def divergence(expected: Array, found: Array) -> tuple[Array, NDArray[np.bool_]]:
    """KL(expected ‖ found) in nats and top-1 agreement for each token.

    Args:
        expected, found: logits, [tokens, vocabulary].
    """
    p, q = _log_softmax(expected), _log_softmax(found)
    return np.sum(np.exp(p) * (p - q), axis=-1), expected.argmax(-1) == found.argmax(-1)


def _compare(
    graph: Graph, sequences: Sequence[Sequence[int]], expected: Sequence[Array], case: Case
) -> dict[str, float]:
    """The largest difference of a logit over all batches, when prefilling and decoding."""
    prefill, decode = [], []
    for start in range(0, len(sequences), case.rows):
        rows, logits = sequences[start : start + case.rows], expected[start : start + case.rows]
        lengths = [len(row) for row in rows]
        found = _prefill(graph, rows, left=case.left)[0]
        prefill.append(_worst(found, logits, lengths, left=case.left))
        for step, found in enumerate(_decode(graph, rows, left=case.left)):
            last = [row[length - STEPS + step] for row, length in zip(logits, lengths, strict=True)]
            decode.append(np.abs(found[:, -1] - np.stack(last)).max())
    return {"prefill": float(np.max(prefill)), "decode": float(np.max(decode))}


def _prefill(
    graph: Graph, sequences: Sequence[Sequence[int]], *, left: bool
) -> tuple[Array, dict[str, Array], Array]:
    """Logits [rows, width, vocabulary], the cache, and the mask [rows, width]."""
    width = max(map(len, sequences))
    tokens = np.zeros((len(sequences), width), np.int64)
    mask = np.zeros((len(sequences), width), np.int64)
    for row, sequence in enumerate(sequences):
        place = _place(len(sequence), width, left=left)
        tokens[row, place], mask[row, place] = sequence, 1
    logits, cache = graph.run(tokens, mask, graph.empty_cache(len(sequences)))
    return logits, cache, mask


def _decode(graph: Graph, sequences: Sequence[Sequence[int]], *, left: bool) -> Iterator[Array]:
    """Logits [rows, 1, vocabulary] for each of the last `STEPS` tokens, fed one at a time."""
    starts = [sequence[:-STEPS] for sequence in sequences]
    _, cache, mask = _prefill(graph, starts, left=left)
    for step in range(-STEPS, 0):
        tokens = np.array([[sequence[step]] for sequence in sequences], np.int64)
        mask = np.concatenate([mask, np.ones((len(sequences), 1), np.int64)], axis=1)
        logits, cache = graph.run(tokens, mask, cache)
        yield logits


def _worst(
    logits: Array, expected: Sequence[Array], lengths: Sequence[int], *, left: bool
) -> float:
    width = logits.shape[1]
    rows = [
        np.abs(logits[row, _place(length, width, left=left)] - expected[row]).max()
        for row, length in enumerate(lengths)
    ]
    return float(np.max(rows))


def _place(length: int, width: int, *, left: bool) -> slice:
    return slice(width - length, width) if left else slice(0, length)


def _alone(graph: Graph, sequence: Sequence[int]) -> Array:
    return _prefill(graph, [sequence], left=True)[0][0]


def _batch_effect(graph: Graph, sequences: Sequence[Sequence[int]]) -> float:
    """The largest change of a logit when a row is put into a batch."""
    together = _prefill(graph, sequences, left=True)[0]
    alone = [_alone(graph, sequence) for sequence in sequences]
    return _worst(together, alone, [len(s) for s in sequences], left=True)


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
