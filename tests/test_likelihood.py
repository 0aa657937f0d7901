"""Likelihood and KL of given answers: by hand, by torch, and by exported graphs."""

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cai_scale import constitution, prompts
from cai_scale.evaluation import measures, relevance
from cai_scale.evaluation.likelihood import ROWS, Ids, Likelihood, Logits, kl_and_nll, likelihood
from cai_scale.records import Message, Prompt, Response

MESSAGES = ({"role": "user", "content": "Why is the sky blue?"},)
ANSWER = "Because a cat sat there, ờ, and again: because."


def test_two_tokens_by_hand() -> None:
    """Probabilities ½ ¼ ¼ under the policy, ¼ ¼ ½ under the base model."""
    policy = np.log(np.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]], np.float32))
    base = np.log(np.array([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25]], np.float32))
    kl, nll = kl_and_nll(policy, base, np.array([0, 1]))
    assert kl == pytest.approx((0.5 * math.log(2) - 0.25 * math.log(2)) / 2)
    assert nll == pytest.approx((math.log(4) + math.log(4)) / 2)
    assert kl_and_nll(policy + 7, base - 3, np.array([0, 1])) == pytest.approx((kl, nll), rel=1e-6)
    assert kl_and_nll(base, policy, np.array([0, 1])) != pytest.approx((kl, nll))  # the control


def test_an_answer_without_a_token_has_no_likelihood() -> None:
    class Dropping:
        def read(self, messages: Sequence[Message], answer: str) -> tuple[Ids, Logits]:
            return np.zeros(0, np.int64), np.zeros((0, 3), np.float32)

    assert likelihood(MESSAGES, "\u200b", Dropping(), Dropping()) == Likelihood(None, None, 0)


def test_large_logits_of_many_tokens_as_in_float64() -> None:
    """More tokens than are worked on at once, and logits as far apart as a real model's."""
    numbers = np.random.default_rng(0)
    policy, base = numbers.normal(0, 12, (2, 2 * ROWS + 5, 4000)).astype(np.float32)
    ids = numbers.integers(0, 4000, len(base))
    p, q = (x.astype(np.float64) for x in (policy, base))
    p -= np.log(np.exp(p).sum(1, keepdims=True))
    q -= np.log(np.exp(q).sum(1, keepdims=True))
    expected = ((np.exp(p) * (p - q)).sum(1).mean(), -q[np.arange(len(ids)), ids].mean())
    assert kl_and_nll(policy, base, ids) == pytest.approx(expected, rel=1e-5)


class Fixed:
    """Foretells the same three letters everywhere."""

    def __init__(self, *logits: float) -> None:
        self.logits = logits
        self.asked = 0

    def read(self, messages: Sequence[Message], answer: str) -> tuple[Ids, Logits]:
        self.asked += 1
        ids = np.array([ord(letter) - ord("a") for letter in answer], np.int64)
        return ids, np.tile(np.array(self.logits, np.float32), (len(ids), 1))


def test_an_empty_answer_has_no_likelihood_and_a_base_model_is_read_once() -> None:
    base = Fixed(0, 0, 0)
    assert likelihood(MESSAGES, "  ", base, base) == Likelihood(None, None, 0)
    found = likelihood(MESSAGES, "ab", base, base)
    assert (found.kl, found.tokens, base.asked) == (0, 2, 1)
    assert found.nll == pytest.approx(math.log(3))
    assert likelihood(MESSAGES, "ab", base, None).kl is None


@pytest.fixture(scope="module")
def adapter(finished_run: Any) -> Path:
    return Path(finished_run.adapter)


def by_hand(model: Any, tokenizer: Any) -> Any:
    """log p of the whole vocabulary at every place of ANSWER, in float64, and its tokens."""
    import torch

    text = tokenizer.apply_chat_template(list(MESSAGES), add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].double()
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].numpy(), np.array(ids)


def test_torch_and_the_graphs_agree_with_a_plain_forward_pass(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    import torch
    from cai_export.policy import export_policy

    from cai_scale.runtime.bundle import open_bundle
    from cai_scale.runtime.generate import Policy
    from cai_scale.training import models
    from cai_scale.training.reader import readers

    tokenizer = models.load_tokenizer(str(tiny_model))
    q, ids = by_hand(models.load_model(str(tiny_model), torch.float32), tokenizer)
    trained = models.load_trained(str(tiny_model), adapter, torch.float32)
    p, _ = by_hand(trained, tokenizer)
    expected = ((np.exp(p) * (p - q)).sum(1).mean(), -q[np.arange(len(ids)), ids].mean())
    assert expected[0] > 1e-3  # or the adapter has learned nothing

    base, policy = readers(str(tiny_model), adapter, torch.float32, tokenizer)
    found = likelihood(MESSAGES, ANSWER, base, policy)
    assert (found.kl, found.nll) == pytest.approx(expected, rel=1e-4)
    assert found.tokens == len(ids)
    # The control: read past the adapter there is no KL.
    past, _ = readers(str(tiny_model), adapter, torch.float32, tokenizer)
    assert likelihood(MESSAGES, ANSWER, base, past).kl == 0

    graphs = []
    for name, product in (("base", None), ("policy", adapter)):
        export_policy(str(tiny_model), product, tmp_path / name, ("fp32",), constitution.load())
        graphs.append(Policy(open_bundle(tmp_path / name)))
    again = likelihood(MESSAGES, ANSWER, *graphs)
    assert (again.kl, again.nll) == pytest.approx(expected, rel=1e-3)
    assert again.tokens == found.tokens


def test_a_graph_without_a_fused_one_reads_the_same(tmp_path: Path, tiny_model: Path) -> None:
    from cai_export import variants
    from cai_export.fuse import fuse
    from cai_export.graph import trace
    from cai_export.merge import merged_policy
    from cai_export.normalise import normalise

    from cai_scale.runtime.graph import FusedGraph, Graph

    merged = merged_policy(str(tiny_model), None)
    (tmp_path / "onnx").mkdir()
    written = variants.write(
        tmp_path, "fp32", {"graph": normalise(trace(merged.model)), "fused": fuse(merged.model)}
    )
    tokens = [5, 9, 200, 31, 7, 300, 12]
    plain = Graph(tmp_path / written["graph"]).logits(tokens, 3)
    fused = FusedGraph(tmp_path / written["fused"]).logits(tokens, 3)
    assert plain.shape == fused.shape == (3, plain.shape[1])
    np.testing.assert_allclose(plain, fused, atol=1e-3)
    assert not np.allclose(plain[:-1], fused[1:], atol=1e-3)  # the control: another place


def answer(prompt: Prompt, text: str) -> Response:
    return Response(
        prompt_id=prompt.id, sample=0, round=0, temperature=1, text=text, tokens=1, finished=True
    )


def test_relevance_is_of_english_answers_that_are_not_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = [
        Prompt(id=language + str(i), messages=MESSAGES, language=language)
        for i, language in enumerate(("en", "vi", "en", "en"))
    ]
    seen: list[str] = []

    def cosines(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        seen.extend(answers)
        return [0.25 * (index + 1) for index in range(len(prompts))]

    monkeypatch.setattr(relevance, "available", lambda: True)
    monkeypatch.setattr(relevance, "relevance", cosines)
    responses = [answer(p, text) for p, text in zip(asked, ("a", "b", " ", "c"), strict=True)]
    rows = measures.measure(asked, responses, "after", Fixed(0, 0, 0), None)
    assert seen == ["a", "c"]
    assert [row["relevance"] for row in rows] == [0.25, None, None, 0.5]
    assert [row["tokens"] for row in rows] == [1, 1, 0, 1]
    assert rows[2]["nll"] is None
    monkeypatch.setattr(relevance, "available", lambda: False)
    rows = measures.measure(asked, responses, "after", Fixed(0, 0, 0), None)
    assert [row["relevance"] for row in rows] == [None] * 4


def test_ranks_share_the_work_and_rank_0_joins(tmp_path: Path) -> None:
    """Two ranks, the second first; and a start that continues reads what is there."""
    from cai_scale.ranks import Ranks
    from cai_scale.results import measured
    from cai_scale.runs import Run

    asked = prompts.load(prompts.TRAIN)[:5]
    before, after = ([answer(p, text * (i + 1)) for i, p in enumerate(asked)] for text in "ab")
    base, policy = Fixed(0, 0, 0), Fixed(2, 0, 0)
    alone = measured(asked, Run(tmp_path / "1"), before, after, lambda: (base, policy), Ranks())
    run, found = Run(tmp_path / "2"), {}

    def work(rank: int) -> None:
        ranks = Ranks(rank, 2, rank, 2)
        found[rank] = measured(asked, run, before, after, lambda: (base, policy), ranks)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {0: alone, 1: alone}
    assert [m.tokens for m in alone["after"]] == [1, 2, 3, 4, 5]
    assert {m.kl for m in alone["before"]} == {0} and min(m.kl or 0 for m in alone["after"]) > 0.1
    files = [path.name for path in run.evaluation("measures").parent.iterdir()]
    assert files == ["measures.jsonl"]

    def never() -> Any:
        raise AssertionError("it is measured already")

    left = run.evaluation("measures").with_name(".measures-2-of-3.jsonl")
    left.write_text("of a start with three ranks, killed")
    assert measured(asked, run, before, after, never, Ranks()) == alone
    assert not left.exists()
