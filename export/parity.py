"""The gate: an exported graph must answer as the trained model does, or it is not in the bundle."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cai_scale.errors import GateError
from cai_scale.runtime.bundle import Bundle
from cai_scale.runtime.chat import Chat
from cai_scale.runtime.generate import Policy
from cai_scale.runtime.graph import FusedGraph, Graph, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Array = NDArray[Any]
Figures = dict[str, Any]

MAX_DELTA = 1e-3  # of a logit, fp32 against torch
MIN_TOKENS = 2000
LENGTHS = (64, 48, 33, 17)  # of the beginnings of sequences that are also read together, padded
ANSWER = 16  # tokens of greedy search, bundle against torch
STEPS = 4  # tokens decoded one at a time, at the end of each sequence


@dataclass(frozen=True)
class Bounds:
    """How far a variant may be from the trained model, over all tokens."""

    kl: float = 0.02  # mean, in nats
    top1: float = 0.95  # share of tokens for which both find the same one the likeliest


def logits_of(model: "PreTrainedModel", sequence: Sequence[int]) -> Array:
    """The torch model's logits for one sequence by itself: [tokens, vocabulary], float32."""
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(sequence)])).logits[0].float().numpy()


class Reference:
    """What the trained model says: its logits for each sequence by itself, kept on disk."""

    def __init__(
        self, folder: Path, model: "PreTrainedModel", sequences: Sequence[Sequence[int]]
    ) -> None:
        """
        Raises:
            GateError: the sequences hold too few tokens to say anything.
        """
        self.sequences, self._folder = sequences, folder
        self.tokens = sum(map(len, sequences))
        if self.tokens < MIN_TOKENS:
            raise GateError(f"{self.tokens} tokens are too few for parity, under {MIN_TOKENS}")
        for index, sequence in enumerate(sequences):
            np.save(folder / f"{index}.npy", logits_of(model, sequence))

    def __getitem__(self, index: int) -> Array:
        """[tokens, vocabulary], float32."""
        return np.load(self._folder / f"{index}.npy")


def measure(graph: Graph, reference: Reference) -> Figures:
    """How far a graph is from the trained model.

    Returns:
        `max_abs_logit_delta`, of rows alone and together, padded on either side (a fused graph:
        on the right), when prefilling and decoding; `alone_against_batch`, the largest change of
        a row's logits when others join it; over all tokens, each sequence by itself, `kl` and
        `kl_max` in nats and the agreement `top1`; and `sequence_log_probability`, the mean and
        largest change of a whole sequence's.
    """
    kl, top1, log_probability, alone = [], [], [], []
    for index, sequence in enumerate(reference.sequences):
        expected, found = reference[index], _prefill(graph, [sequence])[0][0]
        one_kl, one_top1 = divergence(expected, found)
        kl.append(one_kl)
        top1.append(one_top1)
        change = _log_probability(found, sequence) - _log_probability(expected, sequence)
        log_probability.append(abs(change))
        alone.append(np.abs(found - expected).max())
    deltas, joined = _compare_together(graph, reference)
    deltas["alone"]["prefill"] = float(np.max(alone))  # over all of them
    return {
        "max_abs_logit_delta": deltas,
        "alone_against_batch": joined,
        "kl": float(np.concatenate(kl).mean()),
        "kl_max": float(np.concatenate(kl).max()),
        "top1": float(np.concatenate(top1).mean()),
        "sequence_log_probability": {
            "mean": float(np.mean(log_probability)),
            "max": float(np.max(log_probability)),
        },
    }


def check_exact(name: str, figures: Figures) -> None:
    """
    Raises:
        GateError: a logit of the graph differs from the trained model's by more than `MAX_DELTA`.
    """
    deltas = figures["max_abs_logit_delta"]
    worst = float(np.max([list(modes.values()) for modes in deltas.values()]))
    if not worst <= MAX_DELTA:
        raise GateError(
            f"the {name} graph differs from torch by {worst:.2e} in a logit, over {MAX_DELTA:.0e}: "
            f"{deltas}; no bundle was written"
        )


def outside(figures: Figures, bounds: Bounds, joined: float) -> str | None:
    """Which bound a graph does not keep, with its figure; None where it keeps them all.

    Args:
        joined: how far a row's logits may move when others join it.
    """
    if not figures["alone_against_batch"] <= joined:
        moved = figures["alone_against_batch"]
        return f"a row's logits move by {moved:.1e} in a batch, at most {joined:.0e}"
    if not figures["kl"] <= bounds.kl:
        return f"KL {figures['kl']:.4f}, at most {bounds.kl}"
    if not figures["top1"] >= bounds.top1:
        return f"top-1 agreement {figures['top1']:.4f}, at least {bounds.top1}"
    return None


def greedy_answer(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    """The trained model's own answer to a prompt, by greedy search."""
    import torch

    ids = torch.tensor([_encode(tokenizer, text)])
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=ANSWER
        )[0, ids.shape[1] :]
    return str(tokenizer.decode(output, skip_special_tokens=True)).strip()


def check_answers(
    bundle: Bundle, tokenizer: "PreTrainedTokenizerBase", answers: Mapping[str, str | None]
) -> None:
    """Read prompts, and answer them, as the bundle's user does: template, tokens, search.

    Args:
        answers: prompts, and the `greedy_answer` to those that shall be answered too. That takes
            the bundle's fp32 graphs; where it has none, prompts are only read.

    Raises:
        GateError: the runtime reads a prompt otherwise than the trained model's tokenizer, or
            greedy search gives another answer.
    """
    chat = Chat(bundle)
    for text in answers:
        if chat.encode([{"role": "user", "content": text}]) != _encode(tokenizer, text):
            raise GateError(f"the runtime reads {text[:40]!r} otherwise than the tokenizer")
    if "fp32" not in bundle.manifest["variants"]:
        return
    policy = Policy(bundle, "fp32")
    greedy = replace(policy.decoding, temperature=0.0, max_new_tokens=ANSWER)
    for text, answer in answers.items():
        asked = [{"role": "user", "content": text}]
        if answer is not None and policy.answer([asked], greedy)[0].text != answer:
            raise GateError(f"the bundle answers {text[:40]!r} otherwise than the trained model")


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    read = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(read["input_ids"])


def divergence(expected: Array, found: Array) -> tuple[Array, NDArray[np.bool_]]:
    """KL(expected ‖ found) in nats and top-1 agreement for each token.

    Args:
        expected, found: logits, [tokens, vocabulary].
    """
    p, q = _log_softmax(expected), _log_softmax(found)
    kl = np.einsum("tv,tv->t", np.exp(p), p - q).clip(min=0)  # below 0 by rounding alone
    return kl, expected.argmax(-1) == found.argmax(-1)


def _compare_together(graph: Graph, reference: Reference) -> tuple[dict[str, Any], float]:
    """Read the beginnings of some sequences alone and together, at once and token by token.

    Returns:
        The largest differences of a logit from the trained model's, by case and mode, and the
        largest between a row alone and the same row among others.
    """
    rows = [s[:length] for s, length in zip(reference.sequences, LENGTHS, strict=False)]
    truth = [reference[index][: len(row)] for index, row in enumerate(rows)]
    expected = {"prefill": truth, "decode": [logits[-STEPS:] for logits in truth]}
    apart = [_read(graph, [row]) for row in rows]
    alone = {mode: [logits for read in apart for logits in read[mode]] for mode in expected}
    padded = {"right": _read(graph, rows)}
    if not isinstance(graph, FusedGraph):
        padded["left"] = _read(graph, rows, left=True)
    deltas = {
        case: {mode: _worst(read[mode], expected[mode]) for mode in expected}
        for case, read in {"alone": alone, **padded}.items()
    }
    joined = [_worst(read[mode], alone[mode]) for read in padded.values() for mode in expected]
    return deltas, float(np.max(joined))


def _read(
    graph: Graph, sequences: Sequence[Sequence[int]], *, left: bool = False
) -> dict[str, list[Array]]:
    """Each row's logits: `prefill` [tokens, vocabulary], all at once, and `decode`
    [STEPS, vocabulary], its last tokens one at a time."""
    logits = _prefill(graph, sequences, left=left)[0]
    places = [_place(len(sequence), logits.shape[1], left=left) for sequence in sequences]
    steps = list(_decode(graph, sequences, left=left))
    return {
        "prefill": [row[place] for row, place in zip(logits, places, strict=True)],
        "decode": list(np.stack(steps, axis=1)),
    }


def _prefill(
    graph: Graph, sequences: Sequence[Sequence[int]], *, left: bool = False
) -> tuple[Array, dict[str, Array], Array]:
    """Logits [rows, width, vocabulary], the cache, and the mask [rows, width]."""
    tokens, mask = pad(sequences, left=left)
    logits, cache = graph.run(tokens, mask, graph.empty_cache(len(sequences)))
    return logits, cache, mask


def _decode(graph: Graph, sequences: Sequence[Sequence[int]], *, left: bool) -> Iterator[Array]:
    """Logits [rows, vocabulary] for each of the last `STEPS` tokens, fed one at a time."""
    _, cache, mask = _prefill(graph, [sequence[:-STEPS] for sequence in sequences], left=left)
    new = np.ones((len(sequences), 1), np.int64)
    for step in range(-STEPS, 0):
        tokens = np.array([[sequence[step]] for sequence in sequences], np.int64)
        # The contract's new tokens stand in the last column, a fused graph's after their row's.
        order = [new, mask] if isinstance(graph, FusedGraph) else [mask, new]
        mask = np.concatenate(order, axis=1)
        logits, cache = graph.run(tokens, mask, cache)
        yield logits[:, -1]


def _worst(found: Sequence[Array], expected: Sequence[Array]) -> float:
    """The largest absolute difference; NaN where there is one, which Python's max would hide."""
    pairs = zip(found, expected, strict=True)
    return float(np.max([np.abs(one - other).max() for one, other in pairs]))


def _place(length: int, width: int, *, left: bool) -> slice:
    return slice(width - length, width) if left else slice(0, length)


def _log_probability(logits: Array, sequence: Sequence[int]) -> float:
    """Of a sequence after its first token, in nats."""
    chosen = _log_softmax(logits[:-1])[np.arange(len(sequence) - 1), sequence[1:]]
    return float(chosen.sum(dtype=np.float64))


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64))
    return shifted
