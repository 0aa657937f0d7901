"""How far the policy under training has moved from the base model, on its own answers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cai_scale.training import base
from cai_scale.training.live import Sampled
from cai_scale.training.task import Task


def kl(policy: Tensor, other: Tensor) -> Tensor:
    """KL(policy‖other) = Σ_v p(v) (log p(v) - log q(v)) at each position, [tokens], in nats.

    Args:
        policy, other: logits, [tokens, vocabulary].
    """
    log_p, log_q = policy.log_softmax(-1), other.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def from_base(task: Task, trainer: Any, answers: Sequence[Sampled]) -> dict[int, float]:
    """The sum over an answer's tokens of KL(policy‖base), in nats, for this rank's share of the
    answers, by their place. It is over the whole vocabulary, at temperature 1.

    Collective under ZeRO-3, where every forward pass gathers weights: so every rank takes as many
    answers, and with an odd count some answer is taken twice. A row is computed alone, and is the
    same on any number of ranks.
    """
    peers = task.ranks
    turns = -(-len(answers) // peers.world)
    places = [(turn * peers.world + peers.rank) % len(answers) for turn in range(turns)]
    policy = partial(_logits, trainer.model.eval())  # a training step sets it back
    with torch.no_grad(), trainer.accelerator.autocast(), _base(task, trainer) as other:
        return {p: float(kl(policy(answers[p]), other(answers[p])).sum()) for p in places}


@contextmanager
def _base(task: Task, trainer: Any) -> Iterator[Callable[[Sampled], Tensor]]:
    if not task.config.lora:
        with base.loaded(task, trainer) as model:
            yield partial(_logits, model)
        return

    def without_adapter(answer: Sampled) -> Tensor:
        with trainer.model.disable_adapter():
            return _logits(trainer.model, answer)

    yield without_adapter


def _logits(model: Any, answer: Sampled) -> Tensor:
    """At the positions that predict the answer's tokens: [tokens, vocabulary], fp32."""
    ids = torch.tensor([[*answer.prompt_ids, *answer.ids]], device=model.device)
    kept = len(answer.ids) + 1  # the one before the answer, and those in it; the last predicts none
    logits: Tensor = model(input_ids=ids, logits_to_keep=kept, use_cache=False).logits
    return logits[0, :-1].float()
