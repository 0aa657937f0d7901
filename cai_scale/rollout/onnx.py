"""Sample from an exported graph with the runtime's generator: the fast way on a CPU."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from cai_scale.records import Completion
from cai_scale.rollout.sampler import PromptReader, Request
from cai_scale.runtime import generate
from cai_scale.runtime.sampling import Decoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class OnnxSampler:
    """All requests in one queue, from which the places of finished rows are filled."""

    def __init__(
        self,
        load_policy: Callable[[], generate.Policy],
        tokenizer: "PreTrainedTokenizerBase | None",
        *,
        max_new_tokens: int,
        top_p: float,
        top_k: int,
        rows: int,
    ) -> None:
        """
        Args:
            load_policy: called at the first sample, or before where there is no tokenizer.
            tokenizer: reads prompts; the policy's own template and tokens where None.
            max_new_tokens, top_p, top_k: see `runtime.sampling.Decoding`.
            rows: how many answers are under way at once.
        """
        self._load_policy = load_policy
        self._tokens = self._encode if tokenizer is None else PromptReader(tokenizer).tokens
        self.max_new_tokens, self.top_p, self.top_k = max_new_tokens, top_p, top_k
        self.rows = rows

    @functools.cached_property
    def policy(self) -> generate.Policy:
        return self._load_policy()

    def prompt_tokens(self, request: Request) -> int:
        return len(self._tokens(request))

    def sample(self, batches: Sequence[Sequence[Request]]) -> Iterator[tuple[Request, Completion]]:
        generator = generate.Generator(self.policy, self.rows)
        asked = {
            generator.add(self._request(request)): request for batch in batches for request in batch
        }
        while generator.busy:
            for piece in generator.step():
                if piece.completion is not None:
                    yield asked[piece.index], piece.completion

    def _encode(self, request: Request) -> tuple[int, ...]:
        return tuple(self.policy.chat.encode(request.messages))

    def _request(self, request: Request) -> generate.Request:
        return generate.Request(
            tokens=self._tokens(request),
            decoding=Decoding(
                temperature=request.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                max_new_tokens=self.max_new_tokens,
            ),
            id=request.prompt_id,
            seed=request.seed,
            sample=request.sample,
            round=request.round,
        )
