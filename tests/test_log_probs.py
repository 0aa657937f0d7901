"""The frozen head: log-probabilities and their gradients, against a softmax over all logits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer import utils

from cai_scale.training import log_probs
from cai_scale.training.log_probs import FrozenHead, FusedHead

COUNT, WIDTH, VOCABULARY = 300, 16, 97  # more tokens than a chunk has
OUTPUTS = ("entropy", "mean_logits", "is_top1")


@pytest.fixture
def given() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, weight, labels, and what each log-probability weighs in the loss."""
    generator = torch.Generator().manual_seed(0)
    states = 3 * torch.randn(COUNT, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    labels = torch.randint(0, VOCABULARY, (COUNT,), generator=generator)
    return states, weight, labels, torch.randn(COUNT, generator=generator)


def slopes(found: Tensor, states: Tensor, weights: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad((found * weights).sum(), states)
    return gradient


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_values_and_gradients_in_double_precision(given: Any, scale: float) -> None:
    states, weight, labels, weights = given
    exact = states.double().requires_grad_()
    logits = scale * exact @ weight.double().T
    logs = logits.log_softmax(-1)
    expected = logs.gather(1, labels[:, None])[:, 0]

    states.requires_grad_()
    found, entropy, mean, top = FrozenHead.apply(states, weight, labels, scale)
    assert float((found - expected).abs().max()) < 1e-4
    assert float((entropy + (logs.exp() * logs).sum(-1)).abs().max()) < 1e-4
    assert float((mean - logits.mean(-1)).abs().max()) < 1e-4
    assert torch.equal(top, logits.argmax(-1) == labels)
    gradient = slopes(expected, exact, weights)
    assert float((slopes(found, states, weights) - gradient).abs().max()) < 1e-4
    # The control: the labels of the tokens beside.
    moved = FrozenHead.apply(states, weight, labels.roll(1), scale)[0]
    assert float((slopes(moved, states, weights) - gradient).abs().max()) > 0.1


def test_bf16_is_as_near_as_trls(given: Any) -> None:
    states, weight, labels, weights = given
    states.requires_grad_()
    exact = FrozenHead.apply(states, weight, labels, 1.0)[0]
    slope = slopes(exact, states, weights)

    def away(function: Any) -> tuple[float, float]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = function.apply(states, weight.bfloat16(), None, labels, 1.0, 64, None, 1.0)[0]
        gradient = slopes(found, states, weights)
        return float((found - exact).norm()), float((gradient - slope).norm())

    for own, theirs in zip(away(FusedHead), away(ChunkedLogProbFunction), strict=True):
        assert own < 1.2 * theirs


@pytest.mark.parametrize(
    ("bias", "softcap", "trained"), [(True, None, False), (False, 30.0, False), (False, None, True)]
)
def test_other_heads_are_trls(given: Any, bias: bool, softcap: float, trained: bool) -> None:
    states, weight, labels, _ = given
    offset = torch.ones(VOCABULARY) if bias else None
    settings = (offset, labels, 1.0, 64, softcap, 1.0, OUTPUTS)
    states.requires_grad_()
    own = FusedHead.apply(states, weight.requires_grad_(trained), *settings)
    theirs = ChunkedLogProbFunction.apply(states, weight, *settings)
    assert own[0] is not None and type(own[0].grad_fn) is type(theirs[0].grad_fn)


def test_trls_fused_head_takes_only_what_has_a_label(given: Any) -> None:
    """Through TRL's own forward pass: the same numbers, from fewer positions."""
    log_probs.install()
    seen: list[int] = []

    class Counted(FusedHead):
        @staticmethod
        def apply(states: Tensor, *settings: Any) -> Any:
            seen.append(len(states))
            return FusedHead.apply(states, *settings)

    model = tiny()
    ids = torch.arange(12).reshape(2, 6)
    labels = ids.masked_fill(ids % 6 < 4, -100)
    utils._ChunkedLogProbFunction = Counted
    try:
        found = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    finally:
        log_probs.install()
    expected = model(input_ids=ids).logits.log_softmax(-1)[:, :-1]
    expected = expected.gather(-1, ids[:, 1:, None])[..., 0] * (labels[:, 1:] != -100)
    assert seen == [4]
    assert float((found - expected).abs().max()) < 1e-5


def tiny() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    utils.add_fused_lm_head(model)
    return model
