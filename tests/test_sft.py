"""SFT's numbers on tiny models, and what it learns from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cai_scale.methods.sft import best
from tasks import (
    answers,
    distance,
    gradient_norm,
    log_likelihoods,
    log_probabilities,
    train,
    weights,
)


def test_the_best_answer_to_each_prompt_is_learned() -> None:
    rows = answers(3, samples=3)
    assert [(a.prompt.id, a.response.sample) for a in best(rows)] == [("0", 2), ("1", 2), ("2", 2)]
    assert [a.response.sample for a in best(rows[::-1])] == [2, 2, 2]
    level = [*rows[:2], *rows[:2]]
    assert [a.response.sample for a in best(level)] == [1]


def test_the_first_loss_by_hand(tmp_path: Path, tiny_model: Path) -> None:
    """The mean over the answers' tokens, the end among them; prompts are not learned."""
    import torch

    from cai_scale.training.models import load_model, load_tokenizer

    rows = answers(2)
    logs = train(tiny_model, tmp_path / "run", method="sft", answers=rows, batch_size=2)
    model, tokenizer = load_model(str(tiny_model), torch.float32), load_tokenizer(str(tiny_model))
    found = [
        log_probabilities(model, tokenizer, row.prompt.messages, row.response.text)
        for row in best(rows)
    ]
    expected = -np.concatenate(found).mean()
    assert logs[0]["loss"] == pytest.approx(expected, rel=1e-4)
    # The control: the mean of the answers' own means is another number.
    assert abs(-np.mean([f.mean() for f in found]) - expected) > 1e-3 * expected


def test_the_gradient_by_finite_differences(tmp_path: Path, tiny_model: Path) -> None:
    """The first step's, against the mean over tokens of texts one at a time."""
    import torch

    rows = answers(2)

    def tokens(model: Any, tokenizer: Any) -> list[Any]:
        return [
            log_likelihoods(model, tokenizer, row.prompt.messages, row.response.text)
            for row in best(rows)
        ]

    settings = {"method": "sft", "answers": rows, "learning_rate": 1e-30}
    (step,) = train(tiny_model, tmp_path / "run", **settings)
    norm = gradient_norm(tiny_model, tmp_path / "run", lambda *m: -torch.cat(tokens(*m)).mean())
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-3)
    # The control: the mean of the answers' own means.
    other = gradient_norm(
        *(tiny_model, tmp_path / "run"),
        lambda *m: -torch.stack([part.mean() for part in tokens(*m)]).mean(),
    )
    assert step["grad_norm"] != pytest.approx(other, rel=1e-2)


@pytest.mark.parametrize("lora", [True, False])
def test_the_answers_become_likelier(tmp_path: Path, tiny_model: Path, lora: bool) -> None:
    rows = answers(4)
    logs = train(*(tiny_model, tmp_path / "run"), method="sft", answers=rows, epochs=6.0, lora=lora)
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]
    names = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert names == {"checkpoints", "adapter" if lora else "model"}


def test_a_start_continues_where_another_training_ended(tmp_path: Path, tiny_model: Path) -> None:
    """Its first loss is what the other one's adapter gives, and a fresh start's is not."""
    rows = answers(4)
    first = train(tiny_model, tmp_path / "a", method="sft", answers=rows, epochs=6.0)
    start = tmp_path / "a" / "adapter"
    again = train(tiny_model, tmp_path / "b", method="sft", answers=rows, start=start)
    assert again[0]["loss"] < 0.8 * first[0]["loss"]
    # With a learning rate that moves nothing, what comes out is what went in.
    still = {"method": "sft", "answers": rows, "learning_rate": 1e-12}
    train(tiny_model, tmp_path / "c", start=start, **still)
    assert distance(weights(tmp_path / "c"), weights(tmp_path / "a")) < 1e-6
    train(tiny_model, tmp_path / "d", **still)
    assert distance(weights(tmp_path / "d"), weights(tmp_path / "a")) > 0.1


def test_a_whole_model_is_a_start_too(tmp_path: Path, tiny_model: Path) -> None:
    rows = answers(4)
    settings = {"method": "sft", "answers": rows, "lora": False}
    train(tiny_model, tmp_path / "a", **settings)
    start = tmp_path / "a" / "model"
    train(tiny_model, tmp_path / "b", start=start, learning_rate=1e-12, **settings)
    assert distance(weights(tmp_path / "b"), weights(tmp_path / "a")) < 1e-6
