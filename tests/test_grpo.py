"""GRPO's numbers on tiny models, in this process, without DeepSpeed."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cai_scale.config import Config
from cai_scale.errors import ConfigError, IntegrityError
from cai_scale.methods import grpo
from cai_scale.ranks import Ranks
from cai_scale.records import Completion, Prompt, Score, read_jsonl
from cai_scale.rollout.sampler import Request, Sampler, TransformersSampler
from cai_scale.runs import Trained
from cai_scale.training import live
from cai_scale.training.precision import Precision
from cai_scale.training.task import Task


def prompts(count: int = 4) -> list[Prompt]:
    return [
        Prompt(id=f"p{i}", messages=({"role": "user", "content": "Say" + " something" * i},))
        for i in range(count)
    ]


class Letters:
    """A score for saying a letter; all answers with any text are alike where it is ""."""

    name = "letters"

    def __init__(self, letter: str = "e", fail_after: float = float("inf")) -> None:
        self.letter, self.calls, self.fail_after = letter, 0, fail_after

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        self.calls += 1
        if self.calls > self.fail_after:
            raise KeyboardInterrupt
        return [self._score(response) if response else None for response in responses]

    def _score(self, response: str) -> Score:
        value = min(1.0, response.count(self.letter) / 4) if self.letter else 0.5
        return Score({"said": value, "half": value / 2}, value)


def task(model: Path, folder: Path, **changes: Any) -> Task:
    names = ("critic", "sampler", "prompts", "ranks", "ds_config")
    given = {name: changes.pop(name) for name in names if name in changes}
    settings: dict[str, Any] = {
        **{"batch_size": 2, "micro_batch_size": 3, "samples": 4, "max_new_tokens": 10},
        **{"epochs": 1.0, "learning_rate": 3e-3, "lora_r": 4, "temperatures": (0.7, 0.9)},
    }
    return Task(
        config=Config(method="grpo", model=str(model), **settings | changes),
        precision=Precision("fp32", "test"),
        into=Trained(folder),
        **{
            **{"prompts": prompts(), "critic": Letters(), "ranks": Ranks(), "ds_config": None},
            **given,
        },
    )


def logs(folder: Path) -> list[dict[str, Any]]:
    return [r for _, r in read_jsonl(folder / "metrics.jsonl") if "reward" in r]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "step_time"} for record in records]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ends one answer in a few by itself, so that lengths differ."""
    from tiny import save_tiny_gpt2, save_tiny_llama

    save: Callable[..., Path] = {"llama": save_tiny_llama, "gpt2": save_tiny_gpt2}[request.param]
    folder = save(tmp_path_factory.mktemp("models") / request.param)
    # Letters end an answer too: the last one drawn is what a training must learn.
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"eos_token_id": [2, *range(60, 75)]}))
    return folder


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[list[live.Sampled]]:
    """The answers of each step, as the trainer gets them."""
    kept: list[list[live.Sampled]] = []
    rollout = grpo.rollout

    def keep(*arguments: Any) -> dict[str, Any]:
        found = rollout(*arguments)
        kept.append(found["sampled"])
        return found

    monkeypatch.setattr(grpo, "rollout", keep)
    return kept


def log_probabilities(model: Any, one: live.Sampled, temperature: float) -> Any:
    """Of each of an answer's tokens, from a forward pass over this answer alone."""
    import torch

    ids = torch.tensor([[*one.prompt_ids, *one.ids]])
    scores = model(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1] / temperature
    return scores.log_softmax(-1).gather(1, torch.tensor(one.ids)[:, None])[:, 0]


def advantages(step: list[live.Sampled], group: int) -> np.ndarray[Any, Any]:
    rewards = np.array([one.score.overall if one.score else 0.0 for one in step])
    by_prompt = rewards.reshape(-1, group)
    centred = by_prompt - by_prompt.mean(axis=1, keepdims=True)
    return (centred / (by_prompt.std(axis=1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)


def test_loss_and_kl_by_hand(tmp_path: Path, model: Path, sampled: Any) -> None:
    """The second step: the adapter of the first one against the base model."""
    import torch

    from cai_scale.training.models import load_model, with_adapter

    settings = {"epochs": 2.0, "beta": 0.3, "learning_rate": 0.02}
    # All answers at once: TRL logs the mean of what it accumulates.
    job = task(model, tmp_path, prompts=prompts(2), micro_batch_size=8, **settings)
    grpo.train(job)
    base = load_model(str(model), torch.float32)
    policy = with_adapter(base, tmp_path / "checkpoints" / "checkpoint-1")
    step = sampled[1]
    assert {one.prompt.id for one in step} == {"p0", "p1"} and len(step) == 8
    assert len({len(one.ids) for one in step}) > 1
    surprise, kl, tokens = 0.0, 0.0, 0
    with torch.inference_mode():
        for one, advantage in zip(step, advantages(step, 4), strict=True):
            ours = log_probabilities(policy, one, 0.9).double().numpy()
            with policy.disable_adapter():
                ratio = log_probabilities(policy, one, 0.9).double().numpy() - ours
            kl += float((np.exp(ratio) - ratio - 1).sum())
            surprise -= float(advantage) * len(one.ids)
            tokens += len(one.ids)
    logged = logs(tmp_path)[1]
    assert kl / tokens > 1e-3
    assert logged["kl"] == pytest.approx(kl / tokens, rel=1e-3)
    assert logged["loss"] == pytest.approx((surprise + 0.3 * kl) / tokens, rel=1e-3, abs=1e-5)
    rewards = [one.score.overall if one.score else 0.0 for one in step]
    assert logged["reward"] == pytest.approx(np.mean(rewards))
    assert logged["reward_std"] == pytest.approx(np.std(rewards, ddof=1), rel=1e-4)
    assert logged["sampled_tokens"] == sum(one.completion.tokens for one in step)
    halves = [one.score.principles["half"] for one in step if one.score]
    assert logged["principles/half"] == pytest.approx(np.mean(halves))
    assert logged["completions/max_length"] == max(len(one.ids) for one in step)


def test_the_first_gradient_by_hand(tmp_path: Path, model: Path, sampled: Any) -> None:
    """Of the whole model: that of -Σ A log π over the mean of the step's tokens, as ρ is 1."""
    import torch

    from cai_scale.training.models import load_model

    grpo.train(task(model, tmp_path, prompts=prompts(2), lora=False, beta=0.0))
    (step,) = sampled
    policy = load_model(str(model), torch.float32).double()
    trained = list(policy.parameters())

    def loss(weights: Any) -> Any:
        parts = [
            -float(a) * log_probabilities(policy, one, 0.9).sum()
            for one, a in zip(step, weights, strict=True)
        ]
        return sum(parts) / sum(len(one.ids) for one in step)

    def norm(weights: Any) -> float:
        found = torch.autograd.grad(loss(weights), trained)
        return float(sum((part**2).sum() for part in found) ** 0.5)

    (logged,) = logs(tmp_path)
    expected = advantages(step, 4)
    assert logged["grad_norm"] == pytest.approx(norm(expected), rel=1e-3)
    # By finite differences along the gradient too.
    gradient, length = torch.autograd.grad(loss(expected), trained), norm(expected)
    ends = []
    with torch.no_grad():
        for place in (1e-4, -2e-4):  # there, and back to the other side
            for parameter, part in zip(trained, gradient, strict=True):
                parameter.add_(part, alpha=place / length)
            ends.append(float(loss(expected)))
        for parameter, part in zip(trained, gradient, strict=True):
            parameter.add_(part, alpha=1e-4 / length)
    assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(length, rel=1e-3)
    # The control: the advantages of other answers.
    assert logged["grad_norm"] != pytest.approx(norm(np.roll(expected, 1)), rel=1e-2)
    assert not (tmp_path / "adapter").exists()
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in names and not names & {"training_args.bin", "README.md"}


def chance(model: Path, product: Path | None, letter: str) -> float:
    """How likely the first token of the policy's answer to the first prompt has a letter."""
    import torch

    from cai_scale.rollout.sampler import PromptReader
    from cai_scale.training.models import load_tokenizer, load_trained

    tokenizer = load_tokenizer(str(model))
    reader = PromptReader(tokenizer)
    asked = reader.tokens(Request(messages=prompts(1)[0].messages, prompt_id=""))
    policy = load_trained(str(model), product, torch.float32)
    with torch.inference_mode():
        shares = policy(input_ids=torch.tensor([asked])).logits[0, -1].softmax(-1)
    return sum(
        float(share)
        for token, share in enumerate(shares)
        if letter in tokenizer.decode([token], skip_special_tokens=True)
    )


def test_what_the_critic_rewards_becomes_likelier(tmp_path: Path, tiny_model: Path) -> None:
    wide = {"max_new_tokens": 1, "samples": 16, "temperatures": (1.0,), "top_p": 1.0}
    job = task(tiny_model, tmp_path, beta=0.0, steps=12, learning_rate=0.01, top_k=600, **wide)
    grpo.train(job)
    before, after = (chance(tiny_model, product, "e") for product in (None, job.into.adapter))
    assert before < 0.3 and after > 0.6
    history = [record["reward"] for record in logs(tmp_path)]
    assert len(history) == 12
    assert np.mean(history[-3:]) > 2 * np.mean(history[:3])


def test_a_critic_without_preferences_changes_nothing(tmp_path: Path, tiny_model: Path) -> None:
    """The control: equal rewards are no advantage, and β 0 holds nothing."""
    from safetensors.torch import load_file

    grpo.train(task(tiny_model, tmp_path / "a", critic=Letters(""), beta=0.0, lora=False))
    before = load_file(tiny_model / "model.safetensors")
    after = load_file(tmp_path / "a" / "model" / "model.safetensors")
    assert all(bool((before[name] == after[name]).all()) for name in before)
    with pytest.raises(IntegrityError, match="nothing was learned"):
        grpo.train(task(tiny_model, tmp_path / "b", critic=Letters(""), beta=0.0))


class NoAnswers:
    """Answers every other request with nothing, and none with tokens, as a server does."""

    def prompt_tokens(self, request: Request) -> int:
        return 1

    def sample(self, batches: Sequence[Sequence[Request]]) -> Iterator[tuple[Request, Completion]]:
        for request in (request for batch in batches for request in batch):
            text = "" if request.sample % 2 else "see here"
            yield request, Completion(text, 3, request.sample < 2)


def test_empty_answers_and_answers_without_tokens(
    tmp_path: Path, tiny_model: Path, sampled: Any
) -> None:
    from cai_scale.training.models import load_tokenizer

    grpo.train(task(tiny_model, tmp_path, prompts=prompts(2), sampler=lambda folder: NoAnswers()))
    tokenizer = load_tokenizer(str(tiny_model))
    said = tokenizer("see here", add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    expected = [(*said, end), (end,), tuple(said), (end,)]
    assert [one.ids for one in sampled[0]] == expected * 2
    (logged,) = logs(tmp_path)
    assert logged["reward"] == pytest.approx((1.0 + 0.0) / 2)  # four times "e", or empty
    assert logged["principles/said"] == pytest.approx(1.0)  # an empty answer has no score


def test_a_saved_policy_answers_as_the_weights_in_memory_do(
    tmp_path: Path, tiny_model: Path, sampled: Any
) -> None:
    import torch

    from cai_scale.training.models import load_tokenizer, load_trained

    folders: list[Path | None] = []

    def sampler(folder: Path | None) -> Sampler:
        folders.append(folder)
        if folder is not None:
            (folder.parent / "graph").write_text("what a factory makes lies here")
        policy = load_trained(str(tiny_model), folder, torch.float32)
        tokenizer = load_tokenizer(str(tiny_model))
        return TransformersSampler(
            lambda: policy, tokenizer, max_new_tokens=10, top_p=0.95, top_k=50
        )

    for lora in (True, False):
        shared = {"epochs": 2.0, "lora": lora, "learning_rate": 0.01}
        paths = tmp_path / f"memory-{lora}", tmp_path / f"saved-{lora}"
        grpo.train(task(tiny_model, paths[0], **shared))
        grpo.train(task(tiny_model, paths[1], sampler=sampler, **shared))
        ids = [[one.ids for one in step] for step in sampled]
        assert ids[:4] == ids[4:] and ids[0] != ids[2]
        losses = [[record["loss"] for record in logs(path)] for path in paths]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-7)
        assert len(set(folders)) == 4 and (folders[0] is None) is lora  # nothing is learned yet
        assert not any(folder.parent.exists() for folder in folders if folder)
        assert not (paths[1] / ".live").exists()
        sampled.clear(), folders.clear()


def test_a_training_that_was_stopped_continues_as_if_it_had_not_been(
    tmp_path: Path, tiny_model: Path
) -> None:
    from safetensors.torch import load_file

    def weights(name: str) -> dict[str, Any]:
        return dict(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))

    settings = {"epochs": 3.0, "prompts": prompts(5)}  # two steps a pass; one prompt left out
    grpo.train(task(tiny_model, tmp_path / "whole", **settings))
    with pytest.raises(KeyboardInterrupt):
        grpo.train(task(tiny_model, tmp_path / "cut", critic=Letters(fail_after=3), **settings))
    assert not (tmp_path / "cut" / "adapter").exists()
    grpo.train(task(tiny_model, tmp_path / "cut", **settings))
    grpo.train(task(tiny_model, tmp_path / "other", seed=1, **settings))
    figures = [without_times(logs(tmp_path / name)) for name in ("whole", "cut", "other")]
    assert len(figures[0]) == 6
    assert figures[0] == figures[1]
    assert [r["reward"] for r in figures[0]] != [r["reward"] for r in figures[2]]
    whole, continued, other = weights("whole"), weights("cut"), weights("other")
    assert all(bool((whole[name] == continued[name]).all()) for name in whole)
    assert not all(bool((whole[name] == other[name]).all()) for name in whole)


def test_a_start_is_continued_and_the_reference_stays_the_base_model(
    tmp_path: Path, tiny_model: Path
) -> None:
    from dataclasses import replace

    for lora in (True, False):
        settings = {"lora": lora, "beta": 0.1, "learning_rate": 0.02, "prompts": prompts(2)}
        first = task(tiny_model, tmp_path / f"first-{lora}", epochs=3.0, **settings)
        grpo.train(first)
        second = task(tiny_model, tmp_path / f"second-{lora}", **settings)
        grpo.train(replace(second, start=first.into.product, round=2))
        assert logs(first.into.path)[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert logs(second.into.path)[0]["kl"] > 1e-3


def test_the_random_numbers_are_those_of_seed_prompt_sample_round_and_step(
    tmp_path: Path, tiny_model: Path
) -> None:
    import torch
    from accelerate import Accelerator

    from cai_scale.training.models import load_model, load_tokenizer

    policy = load_model(str(tiny_model), torch.float32).train()
    tokenizer = load_tokenizer(str(tiny_model))

    def draw(asked: list[Prompt], samples: int = 4, step: int = 0, **changes: Any) -> Any:
        job = task(tiny_model, tmp_path, **changes)
        trainer = SimpleNamespace(
            model_wrapped=policy,
            accelerator=Accelerator(cpu=True),
            args=SimpleNamespace(gradient_checkpointing_kwargs=None),
            state=SimpleNamespace(global_step=step),
        )
        found = live.LivePolicy(job, tokenizer).sample(trainer, asked, samples, [1.0])  # type: ignore[arg-type]
        assert policy.training
        return {(one.prompt.id, one.sample): one.ids for one in found}

    expected = draw(prompts())
    assert draw(prompts()[::-1], rollout_batch_size=3) == expected
    fewer = draw(prompts(2), samples=2)
    assert fewer == {key: expected[key] for key in fewer} and len(fewer) == 4
    # The controls.
    assert draw(prompts(), step=1) != expected
    assert draw(prompts(), seed=1) != expected
    assert live.round_of(1, 1) > 1000  # rollouts count their rounds from 1
    assert len({live.round_of(r, s) for r in range(1, 5) for s in range(1, 500)}) == 4 * 499


def test_every_pass_has_whole_batches_in_an_order_of_its_own(
    tmp_path: Path, tiny_model: Path
) -> None:
    def order(**settings: Any) -> list[str]:
        given = task(tiny_model, tmp_path, prompts=prompts(7), **settings)
        return [prompt.id for prompt in live.order(given)]

    asked = order(epochs=3.0)
    passes = [asked[start : start + 6] for start in (0, 6, 12)]
    assert len(asked) == 18 and all(len(set(one)) == 6 for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert order(steps=4) == asked[:8]
    assert order(epochs=3.0, seed=1) != asked


def test_prompts_without_room_for_an_answer_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="2 prompts leave no room for an answer of 10 tokens"):
        grpo.train(task(tiny_model, tmp_path, max_length=30))
