"""Score responses with a bundle's reward model: numpy, onnxruntime, tokenizers. No torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cai_scale.errors import DataError
from cai_scale.records import exchange
from cai_scale.runtime.bundle import CONFIG, REWARD, Bundle, unloadable
from cai_scale.runtime.chat import Chat
from cai_scale.runtime.graph import open_session, pad

BATCH_TOKENS = 256  # with padding; more was slower on two cores, and holds more memory


class ScorerGraph:
    """A scorer's graph: tokens and a mask go in, a score a label comes out.

    Positions and the scored token come from the mask inside, so rows may be padded with any token:
    on the right, and where the graph is not fused on either side.
    """

    def __init__(self, path: Path) -> None:
        self._session = open_session(path)

    def run(self, input_ids: NDArray[Any], attention_mask: NDArray[Any]) -> NDArray[np.float32]:
        """Logits, [rows, labels].

        Args:
            input_ids: [rows, tokens], int64.
            attention_mask: [rows, tokens], int64; 0 marks padding.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self._session.run(["logits"], inputs)[0]


class RewardModel:
    """A bundle's reward model.

    `labels` are what it scores: "overall" alone, or each principle by its id; `objective` is
    what it was trained to.
    """

    def __init__(self, bundle: Bundle, variant: str | None = None) -> None:
        graph = bundle.reward_graph(variant)
        self.labels = tuple(str(label) for label in bundle.manifest["reward"]["labels"])
        try:
            self.graph = ScorerGraph(graph)
            self.chat = Chat(bundle, REWARD)
            config = bundle.json(f"{REWARD}/{CONFIG}")
            self.longest = int(config["max_position_embeddings"])
            self.objective = str(config.get("objective", "regression"))
        except Exception as error:  # each reader raises its own kinds
            raise unloadable(bundle, error) from None

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[dict[str, float]]:
        """Each response's score by label, in [0, 1] and in the order of the responses: see
        `bounded`.

        An empty response is scored like any other; it is for the caller to leave it out.

        Raises:
            DataError: a conversation is longer than the model reads, or not Unicode text.
        """
        scores = bounded(self.raw(prompts, responses), self.objective).tolist()
        return [dict(zip(self.labels, row, strict=True)) for row in scores]

    def raw(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float32]:
        """What the head says: [responses, labels], without bounds; otherwise as `score`."""
        rows = [self.encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        return score_tokens(self.graph, rows, len(self.labels))

    def encode(self, prompt: str, response: str) -> list[int]:
        """The tokens of a prompt with its response.

        Raises:
            DataError: they are more than the model reads, or not Unicode text.
        """
        tokens = self.chat.encode(exchange(prompt, response), answer=False)
        check_length(response, tokens, self.longest)
        return tokens


def check_length(response: str, tokens: Sequence[int], longest: float) -> None:
    """Complain about a response that with its prompt is more than a reward model reads.

    Raises:
        DataError: there are more than `longest` tokens, or none.
    """
    if not 0 < len(tokens) <= longest:
        raise DataError(
            f"response {response[:40]!r} and its prompt have {len(tokens)} tokens, the reward "
            f"model reads 1 to {longest}; shorten the response"
        )


def bounded(raw: NDArray[Any], objective: str) -> NDArray[Any]:
    """What a head says as scores in [0, 1], of the same shape.

    Regression has learned such scores, and is clipped. A Bradley-Terry reward has no bounds and
    no zero, only differences mean something: the logistic function keeps its order.
    """
    if objective == "bradley-terry":
        return 0.5 * (1.0 + np.tanh(0.5 * raw))  # the logistic function, without overflow
    return np.clip(raw, 0.0, 1.0)


class Forward(Protocol):
    """A reward model's forward pass, as `ScorerGraph.run`: a graph's, or torch's."""

    def run(self, input_ids: NDArray[Any], attention_mask: NDArray[Any]) -> NDArray[np.float32]: ...


def score_tokens(
    graph: Forward, rows: Sequence[Sequence[int]], labels: int, limit: int = BATCH_TOKENS
) -> NDArray[np.float32]:
    """Score rows of tokens, those of like length together: [rows, labels], in their order."""
    scores = np.empty((len(rows), labels), np.float32)
    for batch in batches([len(row) for row in rows], limit):
        scores[batch] = graph.run(*pad([rows[index] for index in batch]))
    return scores


def batches(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices in batches, the longest first, of at most `limit` tokens with their padding.

    A row longer than `limit` stands alone.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
