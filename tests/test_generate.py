"""The generator: continuous batching gives every request what it gets alone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cai_scale.errors import DataError
from cai_scale.records import Completion
from cai_scale.runtime import generate
from cai_scale.runtime.bundle import open_bundle
from cai_scale.runtime.cache import FusedCache, MaskedCache, open_cache
from cai_scale.runtime.generate import Generator, Policy, Request
from cai_scale.runtime.graph import FusedGraph, Graph

PROMPTS = [
    "Why?",
    "How do I keep bread fresh for a week, and what is the best way to slice it?",
    "Vì sao trời mưa?",
    "Why?",
    "Tell me about rain in the mountains.",
    "x",
    "Is it safe?",
]


@pytest.fixture(scope="module", params=["contract", "fused"])
def policy(bundle: Path, request: pytest.FixtureRequest) -> Policy:
    """The same policy by either kind of graph."""
    opened = open_bundle(bundle)
    policy = Policy(opened, "fp32")
    assert isinstance(policy.graph, FusedGraph)
    if request.param == "contract":
        policy.graph = Graph(opened.graph("fp32"))
    return policy


def requests(policy: Policy, **changes: Any) -> list[Request]:
    """Of different lengths, temperatures and numbers of tokens."""
    made = []
    for index, prompt in enumerate(PROMPTS):
        decoding = replace(
            policy.decoding, temperature=(0.0, 0.7, 1.2)[index % 3], max_new_tokens=4 + 3 * index
        )
        tokens = tuple(policy.chat.encode([{"role": "user", "content": prompt}]))
        made.append(
            Request(tokens=tokens, decoding=replace(decoding, **changes), id=f"p{index}", seed=1)
        )
    return made


def alone(policy: Policy, asked: Sequence[Request]) -> list[Completion]:
    return [policy.complete([request])[0] for request in asked]


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 32])
def test_a_request_gets_in_any_batch_what_it_gets_alone(policy: Policy, rows: int) -> None:
    asked = requests(policy)
    expected = alone(policy, asked)
    assert policy.complete(asked, rows=rows) == expected
    assert policy.complete(asked[::-1], rows=rows)[::-1] == expected
    # The control: other random numbers give other answers.
    assert policy.complete([replace(r, seed=2) for r in asked], rows=rows) != expected


def test_requests_that_come_later_and_others_that_are_cancelled_change_nothing(
    policy: Policy,
) -> None:
    asked = requests(policy, max_new_tokens=12)
    expected = alone(policy, asked)
    generator = Generator(policy, rows=3)
    order: dict[int, int] = {}
    done: dict[int, Completion] = {}
    texts = dict.fromkeys(range(len(asked)), "")

    def step() -> None:
        for piece in generator.step():
            texts[order[piece.index]] += piece.text
            if piece.completion is not None:
                done[order[piece.index]] = piece.completion

    for index in (0, 1, 2, 3):
        order[generator.add(asked[index])] = index
        step()
    dropped = [i for i, index in order.items() if index in (1, 3)]
    for number in dropped:
        generator.cancel(number)
    for index in (4, 5, 6):
        order[generator.add(asked[index])] = index
    while generator.busy:
        step()
    assert done == {i: expected[i] for i in done}
    assert done.keys() >= {0, 2, 4, 5, 6} and 3 not in done
    for index, completion in done.items():
        assert texts[index] == completion.text


def test_the_two_graphs_give_the_same_logits_step_by_step(bundle: Path) -> None:
    """Rows come and go, the longest first, so that both caches grow, move rows and shrink."""
    opened = open_bundle(bundle)
    graphs = Graph(opened.graph("fp32")), FusedGraph(opened.fused("fp32"))
    caches = [open_cache(graph, 4) for graph in graphs]
    assert [type(cache) for cache in caches] == [MaskedCache, FusedCache]
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 500, length).tolist() for length in (40, 1, 7, 0)]
    worst, other = 0.0, 0.0

    def step(rows: int) -> None:
        nonlocal worst, other
        tokens = generator.integers(3, 500, rows)
        masked, fused = (cache.step(tokens).copy() for cache in caches)
        worst = max(worst, float(np.abs(masked - fused).max()))
        if rows > 1:
            other = max(other, float(np.abs(masked[::-1] - fused).max()))

    for cache in caches:
        cache.prefill(prompts[:3], 60)
    step(3)
    for cache in caches:
        cache.drop(0)
    step(2)
    for cache in caches:
        cache.prefill([prompts[3], prompts[0]], 90)
    for _ in range(3):
        step(4)
    for row in (3, 0, 0):
        for cache in caches:
            cache.drop(row)
        step(len(caches[0]._mask))
    assert worst < 1e-4
    assert other > 1  # the control: another row's logits


def test_a_stop_string_and_the_end_token_finish_an_answer(policy: Policy) -> None:
    asked = requests(policy, temperature=0.0, max_new_tokens=30)[1]
    (whole,) = policy.complete([asked])
    stop = whole.text[8:11]
    (cut,) = policy.complete([replace(asked, decoding=replace(asked.decoding, stop=(stop,)))])
    assert cut.text == whole.text[: whole.text.index(stop)].strip()
    assert cut.finished and cut.tokens < whole.tokens
    assert whole.ids is not None and cut.ids == whole.ids[: cut.tokens]
    assert policy.chat.decode(list(whole.ids)) == whole.text
    first = policy.chat.tokenizer.encode(whole.text, add_special_tokens=False).ids[0]
    before, policy.stops = policy.stops, frozenset({first})
    try:
        (empty,) = policy.complete([asked])
        assert empty == Completion("", 0, True) and empty.ids == (first,)
    finally:
        policy.stops = before


def test_a_repetition_penalty_repeats_less(policy: Policy) -> None:
    asked = requests(policy, temperature=0.0, max_new_tokens=40)[0]
    before, policy.stops = policy.stops, frozenset()
    try:
        plain, penalised = (
            policy.chat.tokenizer.encode(answer.text).ids
            for answer in policy.complete(
                [asked, replace(asked, decoding=replace(asked.decoding, repetition_penalty=1.8))]
            )
        )
    finally:
        policy.stops = before
    assert len(set(penalised)) / len(penalised) > len(set(plain)) / len(plain)


def logits_of(graph: Graph, tokens: Sequence[int]) -> Any:
    """[tokens, vocabulary], in one run without a cache."""
    ids = np.array([tokens], np.int64)
    return graph.run(ids, np.ones_like(ids), graph.empty_cache(1))[0][0].astype(np.float64)


def furthest(policy: Policy, request: Request, completion: Completion, shift: int = 0) -> float:
    """How far the told log-probabilities lie from those of the graph, `shift` places later."""
    assert completion.ids is not None and completion.logprobs is not None
    logits = logits_of(policy.graph, [*request.tokens, *completion.ids])
    worst = 0.0
    for place, told in enumerate(completion.logprobs, len(request.tokens) - 1 + shift):
        expected = logits[place] - np.logaddexp.reduce(logits[place])
        pairs = [(told.token, told.logprob), *told.top]
        worst = max(worst, *(abs(expected[token] - value) for token, value in pairs))
    return worst


def test_log_probabilities_are_those_of_the_graph(policy: Policy) -> None:
    asked = [replace(r, top_logprobs=k) for k, r in enumerate(requests(policy), 4)]
    for request, completion in zip(asked, policy.complete(asked, rows=3), strict=True):
        assert completion.ids is not None and completion.logprobs is not None
        assert len(completion.logprobs) == completion.tokens > 0
        told = tuple(item.token for item in completion.logprobs)
        assert told == completion.ids[: completion.tokens]
        assert furthest(policy, request, completion) <= 1e-4
        # The control: the place after it has others.
        assert furthest(policy, request, completion, shift=1) > 1
        logits = logits_of(policy.graph, [*request.tokens, *completion.ids])
        for place, item in enumerate(completion.logprobs, len(request.tokens) - 1):
            assert len(item.top) == request.top_logprobs
            values = [value for _, value in item.top]
            assert values == sorted(values, reverse=True)
            # None that is left out is likelier than the last.
            best = np.sort(logits[place])[::-1] - np.logaddexp.reduce(logits[place])
            assert np.abs(best[: len(values)] - values).max() <= 1e-4
            if request.decoding.temperature == 0:
                assert item.top[0] == (item.token, item.logprob)


def test_log_probabilities_do_not_depend_on_how_a_token_is_chosen(policy: Policy) -> None:
    """Nor on the batch: the same first token's place, in settings that choose differently."""
    plain = requests(policy, temperature=0.0, max_new_tokens=1)[1]
    changes: list[dict[str, Any]] = [
        {"temperature": 1.9},
        {"repetition_penalty": 5.0},
        {"temperature": 1.2, "top_k": 2, "top_p": 0.1, "min_p": 0.9},
    ]
    asked = [replace(r, top_logprobs=20) for r in [plain, *requests(policy)]] + [
        replace(plain, top_logprobs=20, seed=seed, decoding=replace(plain.decoding, **change))
        for change in changes
        for seed in range(4)
    ]
    together = policy.complete(asked)
    (expected,) = policy.complete(asked[:1])
    assert expected.logprobs is not None
    chosen = set()
    others = [together[0], *together[-4 * len(changes) :]]
    for other in others:
        assert other.logprobs is not None
        chosen.add(other.logprobs[0].token)
        top, same = dict(expected.logprobs[0].top), dict(other.logprobs[0].top)
        assert top.keys() == same.keys()
        assert max(abs(top[token] - same[token]) for token in top) <= 1e-4
    assert len(chosen) > 1  # the control: the settings did count for the choice


def test_log_probabilities_cost_nothing_where_they_are_not_wanted(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []

    def counted(logits: Any) -> Any:
        rows.append(logits.shape)
        return log_softmax(logits)

    log_softmax = generate.log_softmax
    monkeypatch.setattr(generate, "log_softmax", counted)
    asked = requests(policy)
    plain = policy.complete(asked)
    assert rows == [] and all(answer.logprobs is None for answer in plain)
    asked[2] = replace(asked[2], top_logprobs=0)
    told = policy.complete(asked)
    assert told == plain
    assert [answer.logprobs is None for answer in told] == [i != 2 for i in range(len(told))]
    assert told[2].ids is not None and told[2].logprobs is not None
    assert len(rows) == len(told[2].ids)
    assert [item.top for item in told[2].logprobs] == [()] * told[2].tokens


def test_a_token_that_ended_the_answer_is_not_listed(policy: Policy) -> None:
    asked = replace(requests(policy, temperature=0.0, max_new_tokens=9)[1], top_logprobs=1)
    (whole,) = policy.complete([asked])
    assert whole.ids is not None and whole.logprobs is not None
    before, policy.stops = policy.stops, frozenset({whole.ids[4]})
    try:
        (cut,) = policy.complete([asked])
    finally:
        policy.stops = before
    ended = whole.ids.index(whole.ids[4])
    assert cut.ids == whole.ids[: ended + 1]
    assert cut.logprobs == whole.logprobs[:ended]


def test_what_the_model_cannot_read_is_refused(policy: Policy) -> None:
    good = requests(policy)[0]
    longest = policy.longest - len(good.tokens)
    for wrong, said in (
        (replace(good, tokens=()), "no tokens"),
        (replace(good, tokens=(policy.graph.vocabulary,)), "outside"),
        (replace(good, tokens=(-1,)), "outside"),
        (replace(good, decoding=replace(good.decoding, max_new_tokens=longest + 1)), "exceed"),
    ):
        with pytest.raises(DataError, match=said):
            Generator(policy).add(wrong)
    policy.check(replace(good, decoding=replace(good.decoding, max_new_tokens=longest)))
