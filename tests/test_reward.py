"""The reward method's numbers on tiny models, in this process, without DeepSpeed."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cai_scale import constitution
from cai_scale.config import Config
from cai_scale.errors import ConfigError
from cai_scale.methods import load_method, reward
from cai_scale.ranks import Ranks
from cai_scale.records import Answer, Candidate, Pair, Prompt, Response, Score, read_jsonl
from cai_scale.runs import Trained
from cai_scale.training import rewards
from cai_scale.training.models import load_scorer, load_tokenizer
from cai_scale.training.precision import Precision
from cai_scale.training.task import Task
from tiny import save_tiny_gpt2, save_tiny_llama

PRINCIPLES = tuple(p.id for p in constitution.load().principles)


def answers(count: int = 8) -> list[Answer]:
    """Two answers to each prompt, of different lengths and scores."""
    return [
        Answer(
            prompt=Prompt(id=str(i // 2), messages=({"role": "user", "content": f"Q{i // 2}?"},)),
            response=Response(
                prompt_id=str(i // 2),
                sample=i % 2,
                round=1,
                temperature=0.7,
                text=f"Answer {i}." + " Really." * (3 * i % 7),
                tokens=5,
                finished=True,
            ),
            score=Score(
                {name: (i * (k + 2)) % 5 / 5 for k, name in enumerate(PRINCIPLES)}, i % 4 / 4
            ),
        )
        for i in range(count)
    ]


def pairs(count: int = 4) -> list[Pair]:
    def candidate(answer: Answer) -> Candidate:
        score = answer.score.overall
        return Candidate(text=answer.response.text, score=score, temperature=0.7, revised=False)

    rows = answers(2 * count)
    return [
        Pair(
            prompt_id=low.prompt.id,
            language="en",
            messages=low.prompt.messages,
            chosen=candidate(high),
            rejected=candidate(low),
        )
        for low, high in zip(rows[::2], rows[1::2], strict=True)
    ]


def task(model: Path, folder: Path, *, precision: str = "fp32", **settings: Any) -> Task:
    own = {"epochs": 2.0, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 3e-3}
    config = Config(method="reward", model=str(model), lora_r=4, **own | settings)
    folder.mkdir(parents=True)
    return Task(
        config=config,
        ranks=Ranks(),
        precision=Precision(precision, "test"),
        ds_config=None,
        into=Trained(folder),
        answers=answers(),
        pairs=pairs(),
    )


def train(one: Task) -> list[dict[str, Any]]:
    load_method("reward").train(one)
    return [record for _, record in read_jsonl(one.into.metrics) if "loss" in record]


def product(one: Task) -> dict[str, Any]:
    from safetensors.torch import load_file

    assert one.into.product is not None
    return dict(load_file(next(one.into.product.glob("*.safetensors"))))


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    return sum(float((a[k] - b[k]).norm() ** 2) for k in a) ** 0.5


@pytest.fixture(scope="module", params=[save_tiny_llama, save_tiny_gpt2])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = request.param(tmp_path_factory.mktemp("models") / "model")
    return folder


def alone(scorer: Any, rows: Sequence[Sequence[int]]) -> Any:
    """Each row by itself, unpadded: the last state of the backbone, and a product in numpy."""
    with torch.inference_mode():
        states = [
            scorer.base_model(input_ids=torch.tensor([list(row)])).last_hidden_state[0, -1]
            for row in rows
        ]
    return torch.stack(states).numpy() @ scorer.score.weight.detach().numpy().T


def test_the_first_losses_by_hand(tmp_path: Path, model: Path) -> None:
    """LoRA changes nothing before the first step, so the loss is the base model's and the head's,
    here from texts that are read one at a time."""
    tokenizer = load_tokenizer(str(model))
    config: dict[str, Any] = {"epochs": 1.0, "batch_size": 8, "seed": 3}

    def rewarded(labels: tuple[str, ...], texts: list[tuple[str, str]]) -> Any:
        scorer = load_scorer(str(model), torch.float32, labels, new_head=True, seed=3)
        return alone(scorer, reward.encode(tokenizer, texts, 512))

    texts = [(a.prompt.text, a.response.text) for a in answers()]
    overall = np.array([[a.score.overall] for a in answers()])
    logs = train(task(model, tmp_path / "overall", **config))
    expected = np.mean((rewarded(("overall",), texts) - overall) ** 2)
    assert logs[0]["loss"] == pytest.approx(expected, rel=1e-4)

    each = np.array([[a.score.principles[p] for p in PRINCIPLES] for a in answers()])
    logs = train(task(model, tmp_path / "each", reward_outputs="principles", **config))
    expected = np.mean((rewarded(PRINCIPLES, texts) - each) ** 2)
    assert logs[0]["loss"] == pytest.approx(expected, rel=1e-4)

    config["batch_size"] = 4
    logs = train(task(model, tmp_path / "pairs", objective="bradley-terry", **config))
    chosen = rewarded(("overall",), [(p.messages[0]["content"], p.chosen.text) for p in pairs()])
    worse = rewarded(("overall",), [(p.messages[0]["content"], p.rejected.text) for p in pairs()])
    gaps = chosen - worse
    assert logs[0]["loss"] == pytest.approx(np.log1p(np.exp(-gaps)).mean(), rel=1e-4)
    assert logs[0]["margin"] == pytest.approx(gaps.mean(), rel=1e-3, abs=1e-6)
    assert logs[0]["accuracy"] == pytest.approx((gaps > 0).mean())


@pytest.mark.parametrize("objective", ["regression", "bradley-terry"])
def test_the_gradient_by_finite_differences(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    """Along a random direction, by the trainer's own loss; in float64, but for the norms."""
    from cai_scale.training import fit

    def check(one: Task, trainer: Any, **shown: str) -> None:
        scorer = trainer.model.double()
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the head's fp32
        batch = next(iter(trainer.get_train_dataloader()))
        batch = {k: v.double() if k == "targets" else v for k, v in batch.items()}

        def loss() -> Any:
            return trainer.compute_loss(scorer, dict(batch))

        weights = [p for p in scorer.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        for weight in weights:  # lora_B is zero, and would hide lora_A
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator).double()
        loss().backward()
        way = [torch.randn(w.shape, generator=generator).double() for w in weights]
        slope = sum(float((w.grad * d).sum()) for w, d in zip(weights, way, strict=True))
        ends = []
        for step in (1e-4, -2e-4):
            for weight, direction in zip(weights, way, strict=True):
                weight.data += step * direction
            ends.append(float(loss()))
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=5e-3)
        assert abs(slope) > 1e-3

    monkeypatch.setattr(fit, "fit", check)
    load_method("reward").train(task(model, tmp_path / "run", objective=objective))


@pytest.mark.parametrize("objective", ["regression", "bradley-terry"])
def test_padding_and_accumulation_change_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    """One row at a time, which pads nothing, against all of a step's rows together; each text
    ends with the token that pads."""
    model = Path(shutil.copytree(model, tmp_path / "model"))
    tokenizer = load_tokenizer(str(model))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(model)
    settings = {"objective": objective, "epochs": 4.0}
    together = task(model, tmp_path / "together", **settings)
    apart = task(model, tmp_path / "apart", **settings, micro_batch_size=1)
    losses = [[log["loss"] for log in train(one)] for one in (together, apart)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-6)
    way = distance(product(together), product(apart))
    size = sum(float(v.norm() ** 2) for k, v in product(together).items() if "lora_B" in k) ** 0.5
    assert way < 1e-2 * size

    # The control: transformers' own pooling, which takes the end of a text for padding.
    from cai_scale.training import scorer

    monkeypatch.setattr(scorer, "pool_by_mask", lambda model: model)
    padded = task(model, tmp_path / "padded", **settings)
    found = [log["loss"] for log in train(padded)]
    assert max(abs(a - b) for a, b in zip(found, losses[0], strict=True)) > 1e-3


def test_it_learns_the_scores(tmp_path: Path, model: Path) -> None:
    logs = train(task(model, tmp_path / "run", epochs=30.0, reward_outputs="principles"))
    assert logs[-1]["loss"] < 0.1 * logs[0]["loss"]
    # The control: on shuffled scores another adapter comes out.
    one, other = (task(model, tmp_path / name) for name in "ab")
    rows = [replace(a, score=b.score) for a, b in zip(answers(), answers()[::-1], strict=True)]
    other = replace(other, answers=rows)
    train(one)
    train(other)
    assert distance(product(one), product(other)) > 0.1


def test_it_learns_the_order(tmp_path: Path, model: Path) -> None:
    logs = train(task(model, tmp_path / "run", epochs=12.0, objective="bradley-terry"))
    assert logs[0]["loss"] == pytest.approx(0.693, abs=0.3)
    assert logs[-1]["loss"] < 0.2
    assert logs[-1]["accuracy"] == 1
    assert logs[-1]["margin"] > 1


@pytest.mark.parametrize(
    "settings", [{}, {"objective": "bradley-terry"}, {"lora": False, "learning_rate": 3e-4}]
)
def test_a_training_resumes_where_it_was(
    tmp_path: Path, tiny_model: Path, settings: dict[str, Any]
) -> None:
    whole = task(tiny_model, tmp_path / "whole", **settings)
    logs = train(whole)
    half = task(tiny_model, tmp_path / "half", **settings)
    checkpoints = whole.into.checkpoints.glob("checkpoint-*")
    kept = min(checkpoints, key=lambda path: int(path.name.split("-")[1]))
    shutil.copytree(kept, half.into.checkpoints / kept.name)
    shutil.copy(whole.into.metrics, half.into.metrics)
    resumed = train(half)
    assert [log["loss"] for log in resumed] == [log["loss"] for log in logs]
    assert distance(product(whole), product(half)) == 0
    # The control: without the checkpoint it is another training.
    other = task(tiny_model, tmp_path / "other", **settings | {"epochs": 1.0})
    train(other)
    assert distance(product(whole), product(other)) > 0


def test_mixed_precision_keeps_the_head_and_the_adapter_in_fp32(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai_scale.training.scorer import Head

    seen = set()
    forward = Head.forward

    def watched(self: Any, states: Any) -> Any:
        found = forward(self, states)
        seen.add((states.dtype, self.weight.dtype, found.dtype))
        return found

    monkeypatch.setattr(Head, "forward", watched)
    one = task(model, tmp_path / "run", precision="bf16")
    mixed = train(one)
    assert seen == {(torch.bfloat16, torch.float32, torch.float32)}
    assert {tensor.dtype for tensor in product(one).values()} == {torch.float32}
    exact = train(task(model, tmp_path / "exact"))
    # bf16's eight bits show, and no more than they.
    assert mixed[0]["loss"] != exact[0]["loss"]
    assert mixed[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.05)


def test_an_adapter_continues_and_one_of_a_policy_starts_a_new_head(
    tmp_path: Path, tiny_model: Path
) -> None:
    first = task(tiny_model, tmp_path / "first")
    logs = train(first)
    second = train(replace(task(tiny_model, tmp_path / "second"), start=first.into.adapter))
    assert second[0]["loss"] < logs[0]["loss"]
    policy = task(tiny_model, tmp_path / "policy")
    load_method("sft").train(replace(policy, answers=answers(8)))
    third = train(replace(task(tiny_model, tmp_path / "third"), start=policy.into.adapter))
    assert third[0]["loss"] != logs[0]["loss"]


def test_a_whole_model_names_its_outputs(tmp_path: Path, tiny_model: Path) -> None:
    one = task(tiny_model, tmp_path / "run", lora=False, reward_outputs="principles")
    train(one)
    source = rewards.find(one.into.model, constitution.load())
    assert (source.labels, source.adapter, source.objective) == (PRINCIPLES, None, "regression")
    two = task(tiny_model, tmp_path / "two", lora=False, objective="bradley-terry")
    train(two)
    assert rewards.find(two.into.model, constitution.load()).objective == "bradley-terry"


def test_bad_data_is_one_line(tmp_path: Path, tiny_model: Path) -> None:
    for objective in ("regression", "bradley-terry"):
        with pytest.raises(ConfigError, match="longer than --max_length 8"):
            train(task(tiny_model, tmp_path / objective, objective=objective, max_length=8))
    one = task(tiny_model, tmp_path / "each", reward_outputs="principles")
    rows = [replace(a, score=Score({}, a.score.overall)) for a in answers()]
    with pytest.raises(ConfigError, match="critic lexicon gives only one score"):
        train(replace(one, answers=rows))


def test_rows_that_fill_no_batch_are_left_out(tmp_path: Path, tiny_model: Path) -> None:
    one = replace(task(tiny_model, tmp_path / "run", epochs=1.0), answers=answers(10))
    assert len(train(one)) == 2
