from typing import Any

import numpy as np
import pytest

from cai_scale.errors import ConfigError
from cai_scale.runtime.sampling import Decoding, choose, penalise, top, uniforms

PINNED = [0.4624391295919219, 0.3594087855165966, 0.20952766846033488]


def test_uniforms_depend_on_everything_they_should_and_repeat() -> None:
    base = uniforms(0, "a", 1, 8, round=2)
    assert np.array_equal(base, uniforms(0, "a", 1, 8, round=2))
    assert np.array_equal(base[:3], uniforms(0, "a", 1, 3, round=2))
    others = [
        uniforms(1, "a", 1, 8, round=2),
        uniforms(0, "b", 1, 8, round=2),
        uniforms(0, "a", 2, 8, round=2),
        uniforms(0, "a", 1, 8, round=3),
    ]
    for other in others:
        assert not np.any(base == other)


def test_uniforms_are_the_same_on_every_machine() -> None:
    assert uniforms(0, "heldout-en-001", 0, 3).tolist() == pytest.approx(PINNED, abs=0)


def test_uniforms_are_uniform() -> None:
    numbers = np.concatenate([uniforms(0, str(i), 0, 100) for i in range(200)])
    assert abs(numbers.mean() - 0.5) < 4 * (1 / 12 / len(numbers)) ** 0.5
    counts = np.histogram(numbers, bins=10, range=(0, 1))[0]
    assert np.all(np.abs(counts - 2000) < 4 * (2000 * 0.9) ** 0.5)


def test_choose_draws_from_the_softmax_at_its_temperature() -> None:
    logits = np.array([2.0, 1.0, 0.0], np.float32)
    numbers = (np.arange(100_000) + 0.5) / 100_000  # an even sweep: shares are exact
    rows = np.broadcast_to(logits, (len(numbers), 3))
    for temperature in (0.5, 1.0, 2.0):
        chosen = choose(rows, numbers, np.full(len(numbers), temperature), top_p=1.0)
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        shares = np.bincount(chosen, minlength=3) / len(numbers)
        assert shares == pytest.approx(expected, abs=2e-5)


def test_choose_keeps_the_smallest_set_that_reaches_top_p() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    numbers = np.linspace(0, 1, 1001)[:-1]
    rows = np.broadcast_to(logits, (len(numbers), 4))
    warm = np.ones(len(numbers))
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.9, 3), (0.99, 4), (1.0, 4)):
        assert choose(rows, numbers, warm, top_p).max() == kept - 1


def test_temperature_zero_takes_the_first_column() -> None:
    logits = np.zeros((3, 5), np.float32)
    assert choose(logits, np.array([0.0, 0.5, 0.99]), np.zeros(3), 1.0).tolist() == [0, 0, 0]


def test_rows_may_differ_in_temperature() -> None:
    logits = np.zeros((2, 4), np.float32)
    assert choose(logits, np.array([0.99, 0.99]), np.array([0.0, 1.0]), 1.0).tolist() == [0, 3]


def test_top_is_a_stable_sort() -> None:
    generator = np.random.default_rng(0)
    logits = generator.integers(0, 50, (20, 200)).astype(np.float32)
    expected = np.argsort(-logits, axis=1, kind="stable")
    found = top(logits, 10)
    for row in range(20):
        assert np.array_equal(logits[row, found[row]], logits[row, expected[row, :10]])
    assert np.array_equal(top(logits, 1), logits.argmax(axis=1)[:, None])
    assert top(logits, 500).shape == (20, 200)


def test_rows_may_differ_in_top_k_and_min_p() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]] * 3, np.float32))
    late = np.full(3, 0.9999)
    kept = choose(
        logits, late, np.ones(3), 1.0, top_k=np.array([2, 4, 4]), min_p=np.array([0, 0.25, 0])
    )
    # two tokens; those at least a quarter as likely as the first (.5, .3, .15); all
    assert kept.tolist() == [1, 2, 3]


def test_min_p_leaves_the_others_their_proportions() -> None:
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    numbers = (np.arange(9_000) + 0.5) / 9_000
    rows = np.broadcast_to(logits, (len(numbers), 3))
    chosen = choose(rows, numbers, np.ones(len(numbers)), 1.0, min_p=0.4)
    assert np.bincount(chosen, minlength=3).tolist() == [6000, 3000, 0]


def test_a_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    logits = np.array([2.0, -2.0, 1.0, -1.0], np.float32)
    penalise(logits, [0, 1, 0], 2.0)
    assert logits.tolist() == [1.0, -4.0, 1.0, -1.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"max_new_tokens": 0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"stop": ("",)},
    ],
)
def test_a_decoding_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 5, "max_new_tokens": 5}
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Decoding(**{**settings, **wrong})
