"""The 8-bit reward scorer against torch in fp32, on texts of mixed length, in turn.

No reward model is trained yet, so one is made: the default model, with a head fitted by ridge
regression from the state of the last token to the lexicon's score of the response. Responses are
put together from bundled prompts and the lexicon's terms. Torch gets what onnxruntime gets: the
same tokens in batches of like length, padded on the right, at the batch size that suits it best.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cai_export.scorer import write_graphs
from cai_export.scorer_parity import order_agreement, spearman
from common import MODEL, in_turn, seconds, write

from cai_scale import constitution, prompts
from cai_scale.constitution import Constitution
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.runtime.graph import pad
from cai_scale.runtime.reward import BATCH_TOKENS, ScorerGraph, batches, score_tokens
from cai_scale.training.models import load_scorer, load_tokenizer
from cai_scale.training.scorer import Scorer

FITTED, TIMED = 192, 256  # texts
RIDGE = 100.0
ROUNDS = 3
LIMITS = (BATCH_TOKENS, 1024, 2048, 8192)  # tokens of a batch with its padding
Texts = Sequence[Sequence[int]]
Score = Callable[[Texts, int], Any]


def main() -> None:
    rules = constitution.load()
    pairs = conversations(rules, FITTED + TIMED)
    targets = [score.overall for score in LexiconCritic(rules).score(*zip(*pairs, strict=True))]
    tokenizer = load_tokenizer(MODEL)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}],
            return_dict=True,
        )["input_ids"]
        for prompt, response in pairs
    ]
    model = load_scorer(MODEL, torch.float32, ["overall"], new_head=True).cpu()
    fit(model, texts[:FITTED], np.array(targets[:FITTED]))
    texts, targets = texts[FITTED:], targets[FITTED:]
    with tempfile.TemporaryDirectory() as folder:
        write(compare(model, texts, targets, Path(folder)))


def conversations(rules: Constitution, count: int) -> list[tuple[str, str]]:
    """Prompts with responses of one to four sentences, each leaning to one list of terms."""
    asked = [p.text for p in [*prompts.load("train"), *prompts.load("heldout")]]
    lists = [
        [term for terms in terms_of.terms.values() for term in terms]
        for principle in rules.principles
        for terms_of in principle.lexicon.lists
    ]
    chance = random.Random(0)

    def response() -> str:
        terms = chance.choice(lists)
        return " ".join(
            f"{' '.join(chance.choices(terms, k=chance.randint(1, 3)))} {chance.choice(asked)}"
            for _ in range(chance.randint(1, 4))
        )

    return [(chance.choice(asked), response()) for _ in range(count)]


def fit(model: Any, texts: Texts, targets: np.ndarray) -> None:
    """Set the head to the ridge regression of `targets` on the last tokens' states."""
    scorer = Scorer(model)
    scorer.head = torch.nn.Identity()
    states = torch_scores(scorer)(texts, BATCH_TOKENS)
    # As many texts as states or fewer: solved in the space of texts.
    dual = np.linalg.solve(states @ states.T + RIDGE * np.eye(len(texts)), targets)
    with torch.no_grad():
        model.score.weight.copy_(torch.from_numpy(states.T @ dual)[None])


def compare(model: Any, texts: Texts, targets: Sequence[float], folder: Path) -> dict[str, Any]:
    """Times in seconds for all texts, each contestant at its best batch size, and agreement."""
    contestants: dict[str, Score] = {"torch fp32": torch_scores(Scorer(model))}
    for name, files in write_graphs(model, folder).items():
        # As the runtime chooses: the fused graph where there is one.
        graph = ScorerGraph(folder / files.get("fused", files["graph"]))
        contestants[f"onnx {name}"] = graph_scores(graph)
    best = {name: best_limit(score, texts) for name, score in contestants.items()}
    times = in_turn(
        {
            name: lambda score=score, limit=best[name]: seconds(lambda: score(texts, limit))
            for name, score in contestants.items()
        },
        ROUNDS,
    )
    scores = {name: score(texts, best[name])[:, 0] for name, score in contestants.items()}
    expected, found = scores["torch fp32"], scores["onnx q8"]
    lengths = [len(text) for text in texts]
    return {
        "texts": len(texts),
        "tokens": sum(lengths),
        "lengths": np.percentile(lengths, [0, 25, 50, 75, 100]).tolist(),
        "batch_tokens": best,
        "seconds": times,
        "ratio": {
            name: times["torch fp32"]["median"] / taken["median"] for name, taken in times.items()
        },
        "spearman": spearman(expected, found),
        "order": order_agreement(expected, found),
        "max_abs_delta": float(np.abs(expected - found).max()),
        "spearman_to_lexicon": spearman(np.array(targets), expected),
    }


def torch_scores(scorer: Scorer) -> Score:
    def score(texts: Texts, limit: int) -> np.ndarray:
        found: dict[int, Any] = {}
        with torch.inference_mode():
            for batch in batches([len(text) for text in texts], limit):
                inputs = (torch.from_numpy(part) for part in pad([texts[i] for i in batch]))
                found.update(zip(batch, scorer(*inputs)["logits"].numpy(), strict=True))
        return np.stack([found[index] for index in range(len(texts))])

    return score


def graph_scores(graph: ScorerGraph) -> Score:
    return lambda texts, limit: score_tokens(graph, texts, 1, limit)


def best_limit(score: Score, texts: Texts) -> int:
    """The batch size in tokens that takes the least time on an eighth of the texts."""
    some = texts[::8]
    return min(LIMITS, key=lambda limit: seconds(lambda: score(some, limit)))


if __name__ == "__main__":
    main()
