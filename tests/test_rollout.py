"""Sampling and collection, on a tiny model and on a fake."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cai_scale.ranks import Ranks
from cai_scale.records import Completion, read_jsonl
from cai_scale.rollout.collect import collect, requests_for
from cai_scale.rollout.sampler import Request, TransformersSampler, cut


def request(text: str, **changes: Any) -> Request:
    message = {"role": "user", "content": text}
    return replace(Request(messages=(message,), prompt_id=text, seed=3), **changes)


@pytest.fixture(scope="module")
def sampler(tiny_model: Path) -> TransformersSampler:
    import torch

    from cai_scale.training.models import load_model, load_tokenizer

    model = load_model(str(tiny_model), torch.float32)
    return TransformersSampler(
        lambda: model, load_tokenizer(str(tiny_model)), max_new_tokens=24, top_p=0.95, top_k=50
    )


TEXTS = ["Why?", "How do I keep bread fresh for a week?", "Tell me about rain.", "Vì sao trời mưa?"]


def answers(sampler: Any, *batch: Request) -> list[Completion]:
    """The completions of one batch, in the order of its requests."""
    found = {id(request): completion for request, completion in sampler.sample([batch])}
    return [found[id(request)] for request in batch]


def test_an_answer_does_not_depend_on_its_batch(sampler: TransformersSampler) -> None:
    requests = [request(text, temperature=t) for text in TEXTS for t in (0.7, 1.0)]
    together = answers(sampler, *requests)
    assert [answers(sampler, r)[0] for r in requests] == together
    assert answers(sampler, *requests[::-1])[::-1] == together
    # The control: any part of a request's identity gives other numbers, and another answer.
    for changes in ({"sample": 1}, {"round": 1}, {"seed": 4}, {"prompt_id": "other"}):
        changed = answers(sampler, *(replace(r, **changes) for r in requests))
        assert changed != together, changes


def test_temperature_zero_is_greedy_search(sampler: TransformersSampler) -> None:
    import torch

    ids = torch.tensor([sampler._reader.tokens(request(TEXTS[1]))])
    with torch.inference_mode():
        output = sampler.model.generate(ids, do_sample=False, max_new_tokens=24)
    expected = sampler.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    (found,) = answers(sampler, request(TEXTS[1], temperature=0.0))
    assert found.text == expected.strip()
    assert answers(sampler, request(TEXTS[1], temperature=1.0))[0].text != found.text


def test_completion_ends_at_the_end_token(sampler: TransformersSampler) -> None:
    end = sampler.tokenizer.eos_token_id
    hello = sampler.tokenizer("hello", add_special_tokens=False).input_ids
    assert sampler._completion([*hello, end, end, 7], {end}) == Completion(
        "hello", len(hello), True
    )
    assert sampler._completion(hello, {end}) == Completion("hello", len(hello), False)
    assert sampler._completion([end], {end}) == Completion("", 0, True)
    assert sampler._completion([*hello, end, end, 7], {end}).ids == (*hello, end)
    assert sampler._completion(hello, {end}).ids == tuple(hello)


class FakeSampler:
    """Answers with the request's own identity, and counts what it was asked."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.asked: list[Request] = []
        self.fail_after = fail_after

    def prompt_tokens(self, request: Request) -> int:
        return len(request.messages[-1]["content"])

    def sample(self, batches: Sequence[Sequence[Request]]) -> Iterator[tuple[Request, Completion]]:
        for batch in batches:
            if self.fail_after is not None and len(self.asked) >= self.fail_after:
                raise KeyboardInterrupt
            self.asked.extend(batch)
            yield from ((r, Completion(f"{r.prompt_id}/{r.sample}", 5, True)) for r in batch)


def make_requests(count: int = 10, samples: int = 3) -> list[Request]:
    from cai_scale.records import Prompt

    prompts = [
        Prompt(id=f"p{i}", messages=({"role": "user", "content": "x" * (i * 7 % 10 + 1)},))
        for i in range(count)
    ]
    return requests_for(prompts, (0.7, 1.0), samples=samples, seed=0, round=1)


def test_temperatures_take_turns_over_the_samples() -> None:
    assert [r.temperature for r in make_requests(1, 5)] == [0.7, 1.0, 0.7, 1.0, 0.7]


def test_batches_hold_everything_once_and_similar_lengths() -> None:
    sampler, requests = FakeSampler(), make_requests()
    batches = cut(sampler, requests, 4)
    flat = [r for batch in batches for r in batch]
    assert sorted((r.prompt_id, r.sample) for r in flat) == sorted(
        (r.prompt_id, r.sample) for r in requests
    )
    lengths = [sampler.prompt_tokens(r) for r in flat]
    assert lengths == sorted(lengths)
    assert batches == cut(sampler, requests[::-1], 4)


def gather(path: Path, sampler: FakeSampler, ranks: Ranks = Ranks()) -> Any:  # noqa: B008
    return collect(sampler, make_requests(), path, batch_size=4, ranks=ranks, title="test")


def test_collect_keeps_the_order_of_the_requests(tmp_path: Path) -> None:
    responses = gather(tmp_path / "r.jsonl", FakeSampler())
    assert [(r.prompt_id, r.sample) for r in responses] == [
        (r.prompt_id, r.sample) for r in make_requests()
    ]
    assert all(r.text == f"{r.prompt_id}/{r.sample}" for r in responses)
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_a_second_start_continues_and_repairs_a_torn_line(tmp_path: Path) -> None:
    whole = gather(tmp_path / "whole.jsonl", FakeSampler())
    path = tmp_path / "r.jsonl"
    first = FakeSampler(fail_after=12)
    with pytest.raises(KeyboardInterrupt):
        gather(path, first)
    part = path.with_suffix(".parts") / "rank-0.jsonl"
    assert not path.exists()
    lines = part.read_bytes().splitlines(keepends=True)
    assert len(lines) == 12
    part.write_bytes(b"".join(lines[:-1]) + lines[-1][:15])  # killed inside the last line
    second = FakeSampler()
    assert gather(path, second) == whole
    assert len(second.asked) == 30 - 8  # the torn batch is asked again, the two whole ones not
    third = FakeSampler()
    assert gather(path, third) == whole
    assert third.asked == []


def test_ranks_share_the_batches(tmp_path: Path) -> None:
    """Rank 1 first, which waits for nobody but the product; then rank 0 joins."""
    import threading

    path, one, zero = tmp_path / "r.jsonl", FakeSampler(), FakeSampler()
    results: dict[int, Any] = {}
    peer = threading.Thread(target=lambda: results.update({1: gather(path, one, Ranks(1, 2))}))
    peer.start()
    results[0] = gather(path, zero, Ranks(0, 2))
    peer.join(timeout=20)
    assert results[0] == results[1] == gather(tmp_path / "alone.jsonl", FakeSampler())
    shared = {(r.prompt_id, r.sample) for r in zero.asked} & {
        (r.prompt_id, r.sample) for r in one.asked
    }
    assert not shared
    assert (len(zero.asked), len(one.asked)) == (16, 14)
    assert len([r for _, r in read_jsonl(path)]) == 30


def test_the_onnx_sampler_answers_as_transformers_does(
    tiny_model: Path, sampler: TransformersSampler, tmp_path: Path
) -> None:
    """Fifty prompts, greedy and sampled: the same tokens' text from the exported graph."""
    from cai_export.policy import export_policy

    from cai_scale import constitution, prompts
    from cai_scale.rollout.onnx import OnnxSampler
    from cai_scale.runtime.bundle import open_bundle
    from cai_scale.runtime.generate import Policy

    export_policy(str(tiny_model), None, tmp_path / "policy", ("fp32",), constitution.load())
    onnx = OnnxSampler(
        lambda: Policy(open_bundle(tmp_path / "policy")),
        sampler.tokenizer,
        max_new_tokens=24,
        top_p=0.95,
        top_k=50,
        rows=16,
    )
    for temperature in (0.0, 0.8):
        asked = [
            request(prompt.text, temperature=temperature)
            for prompt in prompts.load(prompts.TRAIN)[:50]
        ]
        assert answers(onnx, *asked) == answers(sampler, *asked)
        assert answers(onnx, *(replace(r, seed=4) for r in asked)) != answers(sampler, *asked) or (
            temperature == 0
        )
