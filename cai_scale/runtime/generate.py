"""Generate with an exported graph: numpy and onnxruntime."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from cai_scale.errors import DataError, IntegrityError
from cai_scale.records import Completion, Message
from cai_scale.runtime.bundle import CONFIG, GENERATION, Bundle
from cai_scale.runtime.chat import Chat
from cai_scale.runtime.sampling import Decoding, choose, top, uniforms

Array = NDArray[Any]


class Graph:
    """A policy graph: tokens and a cache go in, logits and the longer cache come out.

    It is masked and takes `position_ids`, so rows may be padded on either side.
    """

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = self.session.get_inputs()
        self._cache = {i.name: i.shape for i in inputs if i.name.startswith("past_key_values.")}
        self._outputs = [o.name for o in self.session.get_outputs()]

    def empty_cache(self, rows: int) -> dict[str, Array]:
        """A cache of no tokens: [rows, heads, 0, head size] for each input."""
        return {
            name: np.zeros((rows, shape[1], 0, shape[3]), np.float32)
            for name, shape in self._cache.items()
        }

    def run(
        self, input_ids: Array, attention_mask: Array, cache: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """One step.

        Args:
            input_ids: [rows, new tokens], int64.
            attention_mask: [rows, cached + new tokens], int64; 0 marks padding.
            cache: from `empty_cache` or the step before.

        Returns:
            Logits [rows, new tokens, vocabulary] in float32, and the cache with the new tokens.
        """
        positions = np.clip(np.cumsum(attention_mask, axis=1) - 1, 0, None)
        values = self.session.run(
            self._outputs,
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "position_ids": positions[:, -input_ids.shape[1] :],
                **cache,
            },
        )
        outputs = dict(zip(self._outputs, values, strict=True))
        logits = outputs.pop("logits")
        return logits, {
            name.replace("present.", "past_key_values.", 1): value
            for name, value in outputs.items()
        }


class Policy:
    """A bundle's language model."""

    def __init__(self, bundle: Bundle, variant: str | None = None) -> None:
        graph = bundle.graph(variant)
        try:
            self._load(bundle, graph)
        except Exception as error:  # each reader raises its own kinds
            reason = " ".join(str(error).split())[:200]
            raise IntegrityError(
                f"bundle {bundle.path} cannot be loaded ({type(error).__name__}: {reason}); "
                f"export it again"
            ) from None

    def _load(self, bundle: Bundle, graph: Path) -> None:
        self.graph = Graph(graph)
        self.chat = Chat(bundle)
        settings = bundle.json(GENERATION)
        ends = settings["eos_token_id"]
        self.stops = [ends] if isinstance(ends, int) else list(ends)
        self.pad = settings["pad_token_id"]
        self.longest = int(bundle.json(CONFIG)["max_position_embeddings"])
        self.decoding = Decoding(
            temperature=settings["temperature"],
            top_p=settings["top_p"],
            top_k=settings["top_k"],
            max_new_tokens=settings["max_new_tokens"],
        )

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        decoding: Decoding | None = None,
        *,
        seed: int = 0,
        ids: Sequence[str] | None = None,
    ) -> list[Completion]:
        """Answer a batch of conversations.

        Args:
            decoding: the bundle's own where None.
            seed: with a conversation's id it decides the random numbers, as in training.
            ids: one a conversation; its last message's text where None.

        Raises:
            DataError: a conversation leaves no room for the answer.
        """
        decoding = decoding or self.decoding
        prompts = [self.chat.encode(messages) for messages in conversations]
        for prompt in prompts:
            if not prompt:
                raise DataError("the chat template renders nothing; export the bundle again")
            if len(prompt) + decoding.max_new_tokens > self.longest:
                raise DataError(
                    f"a prompt of {len(prompt)} tokens and an answer of {decoding.max_new_tokens} "
                    f"exceed the model's {self.longest}; shorten the prompt or the answer"
                )
        names = ids or [messages[-1]["content"] for messages in conversations]
        numbers = np.stack([uniforms(seed, name, 0, decoding.max_new_tokens) for name in names])
        return [self._answer(tokens) for tokens in self._generate(prompts, decoding, numbers)]

    def _generate(
        self, prompts: list[list[int]], decoding: Decoding, numbers: NDArray[np.float64]
    ) -> list[list[int]]:
        rows, width = len(prompts), max(map(len, prompts))
        tokens = np.full((rows, width), self.pad, np.int64)
        mask = np.zeros((rows, width), np.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        temperature = np.full(rows, decoding.temperature)
        cache = self.graph.empty_cache(rows)
        written: list[list[int]] = [[] for _ in range(rows)]
        for step in range(decoding.max_new_tokens):
            logits, cache = self.graph.run(tokens, mask, cache)
            columns = top(logits[:, -1], 1 if decoding.temperature == 0 else decoding.top_k)
            values = np.take_along_axis(logits[:, -1], columns, axis=1)
            choice = choose(values, numbers[:, step], temperature, decoding.top_p)
            tokens = np.take_along_axis(columns, choice[:, None], axis=1)
            mask = np.concatenate([mask, np.ones((rows, 1), np.int64)], axis=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if not written[row] or written[row][-1] not in self.stops:
                    written[row].append(token)
            if all(row[-1] in self.stops for row in written):
                break
        return written

    def _answer(self, tokens: list[int]) -> Completion:
        finished = tokens[-1] in self.stops
        kept = tokens[:-1] if finished else tokens
        return Completion(self.chat.decode(kept), len(kept), finished)
