"""Rollouts: the runtime's generator against `transformers.generate`, real tokens a second.

64 bundled prompts, temperature 0.7, top-k 50, top-p 0.95. Once with answers of one length, the end
token ignored; once with the answers' own lengths up to a cap, where `generate` goes on until a
batch's last row has ended and the generator fills the places of finished rows.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

from common import MODEL, in_turn, policy_bundle, seconds, write

from cai_scale import prompts
from cai_scale.runtime.generate import Policy, Request

PROMPTS, LENGTH, CAP, ROUNDS = 64, 96, 256, 3
TRIED = 32  # tokens an answer, to find the batch size that suits each contestant
BATCHES = (16, 32, 64)


class Torch:
    """`transformers.generate` on left-padded batches of similar length."""

    def __init__(self, dtype: str) -> None:
        import torch

        from cai_scale.training import models

        self.torch = torch
        self.model = models.load_model(MODEL, getattr(torch, dtype))
        self.tokenizer = models.load_tokenizer(MODEL)

    def run(self, requests: list[Request], batch: int, *, fixed: bool) -> list[int]:
        ordered = sorted(requests, key=lambda request: len(request.tokens))
        lengths = []
        for start in range(0, len(ordered), batch):
            lengths += self._batch(ordered[start : start + batch], fixed=fixed)
        return lengths

    def _batch(self, requests: list[Request], *, fixed: bool) -> list[int]:
        limit = requests[0].decoding.max_new_tokens
        encoded = self.tokenizer.pad(
            {"input_ids": [list(request.tokens) for request in requests]},
            return_tensors="pt",
            padding_side="left",
        )
        width = encoded["input_ids"].shape[1]
        with self.torch.inference_mode():
            output = self.model.generate(
                **encoded,
                do_sample=True,
                temperature=0.7,
                top_k=50,
                top_p=0.95,
                max_new_tokens=limit,
                min_new_tokens=limit if fixed else None,
                pad_token_id=self.tokenizer.pad_token_id,
            )[:, width:]
        end = self.tokenizer.eos_token_id
        rows = output.tolist()
        return [row.index(end) if end in row and not fixed else len(row) for row in rows]


class Onnx:
    """The runtime's generator, which shares nothing with torch."""

    def __init__(self, variant: str) -> None:
        self.policy = Policy(policy_bundle(), variant)
        self.ends = self.policy.stops

    def run(self, requests: list[Request], batch: int, *, fixed: bool) -> list[int]:
        self.policy.stops = frozenset() if fixed else self.ends
        return [answer.tokens for answer in self.policy.complete(requests, rows=batch)]


def main() -> None:
    contestants: dict[str, Any] = {
        "transformers fp32": Torch("float32"),
        "transformers bf16": Torch("bfloat16"),
        "onnx fp32": Onnx("fp32"),
        "onnx q8": Onnx("q8"),
        "onnx q4": Onnx("q4"),
    }
    reader = contestants["onnx fp32"].policy
    asked = [
        Request(tokens=tuple(reader.chat.encode(p.messages)), decoding=reader.decoding, id=p.id)
        for p in prompts.load("train")[:PROMPTS]
    ]
    tried = requests_of(asked, TRIED)
    best = {
        name: max(BATCHES, key=lambda batch, run=run: rate(run, tried, batch, fixed=True)[0])
        for name, run in contestants.items()
    }
    write(
        {
            "prompts": PROMPTS,
            "length": LENGTH,
            "cap": CAP,
            "one length": compare(contestants, best, requests_of(asked, LENGTH), fixed=True),
            "own lengths": compare(contestants, best, requests_of(asked, CAP), fixed=False),
        }
    )


def requests_of(asked: list[Request], limit: int) -> list[Request]:
    return [replace(r, decoding=replace(r.decoding, max_new_tokens=limit)) for r in asked]


def rate(
    contestant: Any, requests: list[Request], batch: int, *, fixed: bool
) -> tuple[float, list[int]]:
    """Generated tokens a second, and the length of each answer."""
    lengths: list[int] = []
    spent = seconds(lambda: lengths.extend(contestant.run(requests, batch, fixed=fixed)))
    return sum(lengths) / spent, lengths


def compare(
    contestants: dict[str, Any], best: dict[str, int], requests: list[Request], *, fixed: bool
) -> dict[str, dict[str, Any]]:
    """Tokens a second of each contestant, at the batch size that suits it best."""
    lengths: dict[str, list[int]] = {}

    def measured(name: str) -> float:
        found, lengths[name] = rate(contestants[name], requests, best[name], fixed=fixed)
        return found

    figures = in_turn({name: lambda name=name: measured(name) for name in contestants}, ROUNDS)
    for name, figure in figures.items():
        histogram = Counter(length // 32 * 32 for length in lengths[name])
        figure |= {"batch": best[name], "lengths": dict(sorted(histogram.items()))}
    return figures


if __name__ == "__main__":
    main()
