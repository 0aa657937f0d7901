"""Samplers: requests for an answer go in, texts come out. The random numbers are the request's."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cai_scale.records import Completion, Message
from cai_scale.runtime.sampling import choose, uniforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Request:
    """One answer to sample; (seed, round, prompt_id, sample) decides its random numbers."""

    messages: tuple[Message, ...]
    prompt_id: str
    sample: int = 0
    round: int = 0
    seed: int = 0
    temperature: float = 1.0


class Sampler(Protocol):
    """Anything that answers requests."""

    def prompt_tokens(self, request: Request) -> int:
        """The length of a request's prompt, by which batches are cut."""
        ...

    def sample(self, batches: Sequence[Sequence[Request]]) -> Iterator[tuple[Request, Completion]]:
        """Answer the requests of batches that `cut` made, in any order, as they finish."""
        ...


def cut(sampler: Sampler, requests: Sequence[Request], size: int) -> list[list[Request]]:
    """Batches of similar prompt length. They are cut before they are shared out among ranks,
    so that an answer meets the same batch on any number of them."""
    ordered = sorted(requests, key=lambda r: (sampler.prompt_tokens(r), r.prompt_id, r.sample))
    return [list(ordered[start : start + size]) for start in range(0, len(ordered), size)]


class PromptReader:
    """Reads a request as the model does: chat template and tokens, each prompt once."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self._tokens: dict[tuple[str, ...], tuple[int, ...]] = {}

    def tokens(self, request: Request) -> tuple[int, ...]:
        key = tuple(message["content"] for message in request.messages)
        if key not in self._tokens:
            encoded = self.tokenizer.apply_chat_template(
                list(request.messages), add_generation_prompt=True, return_dict=True
            )
            self._tokens[key] = tuple(encoded["input_ids"])
        return self._tokens[key]


class TransformersSampler:
    """Samples with `generate`, batch by batch, left-padded."""

    def __init__(
        self,
        load_model: Callable[[], "PreTrainedModel"],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_new_tokens: int,
        top_p: float,
        top_k: int,
    ) -> None:
        """
        Args:
            load_model: called at the first sample, so that a continued run which has all its
                answers loads none.
            max_new_tokens, top_p, top_k: see `runtime.sampling.Decoding`.
        """
        self._load_model, self.tokenizer = load_model, tokenizer
        self._reader = PromptReader(tokenizer)
        self.max_new_tokens, self.top_p, self.top_k = max_new_tokens, top_p, top_k

    @functools.cached_property
    def model(self) -> "PreTrainedModel":
        return self._load_model()

    def prompt_tokens(self, request: Request) -> int:
        return len(self._reader.tokens(request))

    def sample(self, batches: Sequence[Sequence[Request]]) -> Iterator[tuple[Request, Completion]]:
        for batch in batches:
            yield from zip(batch, self._sample(batch), strict=True)

    def _sample(self, batch: Sequence[Request]) -> list[Completion]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        encoded = self.tokenizer.pad(
            {"input_ids": [list(self._reader.tokens(request)) for request in batch]},
            return_tensors="pt",
            padding_side="left",
        ).to(self.model.device)
        width = encoded["input_ids"].shape[1]
        ends = self.model.generation_config.eos_token_id
        # Greedy search over logits that already hold the choice: `SeededChoice` makes it.
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                generation_config=settings,
                logits_processor=LogitsProcessorList([self._chooser(batch, width)]),
                # The weights are whole on every rank, under ZeRO-3 too: none waits for another.
                synced_gpus=False,
            )
        stops = {ends} if isinstance(ends, int) else set(ends or ())
        return [self._completion(row, stops) for row in output[:, width:].tolist()]

    def _chooser(self, batch: Sequence[Request], width: int) -> "SeededChoice":
        numbers = [
            uniforms(r.seed, r.prompt_id, r.sample, self.max_new_tokens, round=r.round)
            for r in batch
        ]
        temperatures = np.array([request.temperature for request in batch])
        return SeededChoice(np.stack(numbers), temperatures, self.top_p, self.top_k, width)

    def _completion(self, row: list[int], stops: set[int]) -> Completion:
        end = next((i for i, token in enumerate(row) if token in stops), None)
        kept = row if end is None else row[:end]
        text = self.tokenizer.decode(kept, skip_special_tokens=True).strip()
        drawn = row if end is None else row[: end + 1]
        return Completion(text, len(kept), end is not None, tuple(drawn))


class SeededChoice:
    """A logits processor that leaves one token possible in each row: the one drawn with the
    row's own random numbers."""

    def __init__(
        self,
        numbers: "np.typing.NDArray[np.float64]",
        temperatures: "np.typing.NDArray[np.float64]",
        top_p: float,
        top_k: int,
        width: int,
    ) -> None:
        self.numbers, self.temperatures = numbers, temperatures
        self.top_p, self.top_k, self.width = top_p, top_k, width

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Shapes: `input_ids` [rows, tokens so far], `scores` [rows, vocabulary]."""
        import torch

        step = input_ids.shape[1] - self.width
        values, tokens = torch.topk(scores.float(), min(self.top_k, scores.shape[1]))
        column = choose(values.cpu().numpy(), self.numbers[:, step], self.temperatures, self.top_p)
        chosen = tokens.gather(1, torch.from_numpy(column)[:, None].to(tokens.device))
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)
