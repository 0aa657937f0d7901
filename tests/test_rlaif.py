"""RLAIF's numbers on tiny models, in this process, without DeepSpeed."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tasks
from cai_scale.config import Config
from cai_scale.errors import ConfigError
from cai_scale.methods import load_method, rlaif
from cai_scale.ranks import Ranks
from cai_scale.records import Answer, Prompt, Response, Score, read_json, read_jsonl
from cai_scale.runs import Trained
from cai_scale.training import reward_head
from cai_scale.training.live import LivePolicy
from cai_scale.training.models import load_model, load_tokenizer, load_trained
from cai_scale.training.positions import positions
from cai_scale.training.precision import Precision
from cai_scale.training.task import Task
from tiny import save_tiny_gpt2

BACKBONES = ("shared", "detached", "separate")
ADAPTER = "adapter/adapter_model.safetensors"


def answers(count: int = 8) -> list[Answer]:
    """Rows of quite different lengths and scores."""

    def answer(i: int) -> Answer:
        prompt = Prompt(id=str(i), messages=({"role": "user", "content": f"Question {i}?"},))
        text = f"Yes, {i} is a good number." + " Really." * (i * i % 11)
        response = Response(
            prompt_id=str(i),
            sample=0,
            round=1,
            temperature=0.7,
            text=text,
            tokens=1,
            finished=True,
        )
        return Answer(prompt=prompt, response=response, score=Score({}, 0.3 + 0.07 * (i % 9)))

    return [answer(i) for i in range(count)]


def task(model: Path, folder: Path, rows: list[Answer] | None = None, **settings: Any) -> Task:
    start, precision = settings.pop("start", None), settings.pop("precision", "fp32")
    defaults = {"epochs": 1.0, "batch_size": 4, "learning_rate": 3e-3, "lora_r": 4}
    return Task(
        config=Config(method="rlaif", model=str(model), **defaults | settings),
        ranks=Ranks(),
        precision=Precision(precision, "test"),
        ds_config=None,
        into=Trained(folder),
        start=start,
        answers=answers() if rows is None else rows,
    )


def train(*arguments: Any, **settings: Any) -> list[dict[str, Any]]:
    given = task(*arguments, **settings)
    given.into.path.mkdir(exist_ok=True)
    load_method("rlaif").train(given)
    return [record for _, record in read_jsonl(given.into.metrics) if "loss" in record]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """All that a training has left: adapter or model, and head."""
    files = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    return {k: v.double() for f in (*files, Trained(folder).head) for k, v in load_file(f).items()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return float(sum(((a[k] - b[k]) ** 2).sum() for k in a) ** 0.5)


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_gpt2(tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture(params=["llama", "gpt2"])
def either(request: pytest.FixtureRequest, tiny_model: Path, tiny_gpt2: Path) -> Path:
    return tiny_model if request.param == "llama" else tiny_gpt2


# The worked examples


def test_lm_loss_of_the_worked_example() -> None:
    """A row of six tokens: the first is given, five are predicted with these probabilities."""
    chances = torch.tensor([0.40, 0.25, 0.10, 0.05, 0.20])
    lm = rlaif.lm_losses(chances.log()[None], torch.ones(1, 6).long())
    assert lm.shape == (1,)
    assert 5 * float(lm) == pytest.approx(9.2103, abs=5e-5)
    assert float(lm) == pytest.approx(1.8421, abs=5e-5)
    assert float(lm.exp()) == pytest.approx(6.31, abs=5e-3)


@pytest.mark.parametrize(
    ("lm", "predicted", "score", "weight", "total"),
    [
        (0.0, 0.52, 0.78, 1.0, 0.0676),
        (1.8421, 0.52, 0.78, 0.1 * 1, 1.8489),
        (1.8421, 0.52, 0.78, 0.1 * 0.5, 1.8455),
        (1.2, 0.5**0.5, 0.0, 0.2, 1.3),
        (2.1, 0.65, 0.85, 0.2, 2.108),
        (0.0, 0.6, 0.8, 1.0, 0.04),
    ],
)
def test_loss_of_the_worked_examples(
    lm: float, predicted: float, score: float, weight: float, total: float
) -> None:
    found = rlaif.loss(*(torch.tensor([x]) for x in (lm, predicted, score)), weight)
    assert float(found) == pytest.approx(total, abs=5e-5)


def test_the_mean_is_over_rows() -> None:
    lm, predicted, scores = torch.tensor([[1.0, 3.0], [0.5, 0.1], [0.5, 0.5]])
    assert float(rlaif.loss(lm, predicted, scores, 0.5)) == pytest.approx(2 + 0.5 * 0.08)


# Against plain models


def test_logged_figures_by_hand(either: Path, tmp_path: Path) -> None:
    """The first step, in numpy, from the plain model's outputs for one row at a time."""
    rows = answers(4)
    first = train(either, tmp_path / "run", rows, reward_weight=0.3, reward_scale=1.0)[0]
    given = task(either, tmp_path / "again", rows)
    score = rlaif.policy(given).base_model.model.score
    weight, bias = (score.get_parameter(f"modules_to_save.default.{n}") for n in ("weight", "bias"))
    weight, bias = weight[0].detach().double().numpy(), float(bias)
    plain, tokenizer = load_model(str(either), torch.float32), load_tokenizer(str(either))
    lm, predicted = [], []
    for row in rlaif.rows(rows, tokenizer, 512):
        ids = torch.tensor([row["input_ids"]])
        with torch.inference_mode():
            logits = plain(input_ids=ids).logits[0].double().numpy()
            state = plain.base_model(input_ids=ids).last_hidden_state[0, -1].double().numpy()
        logits -= logits.max(-1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        lm.append(-np.mean([logs[i, ids[0, i + 1]] for i in range(ids.shape[1] - 1)]))
        predicted.append(state @ weight + bias)
    scores = np.array([answer.score.overall for answer in rows])
    reward = np.mean((predicted - scores) ** 2)
    assert first["lm_loss"] == pytest.approx(np.mean(lm), rel=1e-5)
    assert first["reward_loss"] == pytest.approx(reward, rel=1e-5)
    assert first["loss"] == pytest.approx(np.mean(lm) + 0.3 * reward, rel=1e-4)
    assert first["critic_score"] == pytest.approx(scores.mean(), rel=1e-6)
    assert first["correlation"] == pytest.approx(np.corrcoef(predicted, scores)[0, 1], rel=1e-4)


def test_both_losses_fall_and_the_correlation_rises(tiny_model: Path, tmp_path: Path) -> None:
    logs = train(tiny_model, tmp_path / "run", answers(4), epochs=25.0, learning_rate=1e-2)
    assert len(logs) == 25
    assert logs[-1]["lm_loss"] < 0.5 * logs[0]["lm_loss"]
    assert logs[-1]["reward_loss"] < 0.01 < logs[0]["reward_loss"]
    assert logs[-1]["correlation"] > 0.9


def test_a_correlation_with_a_constant_is_left_out() -> None:
    a, b = torch.tensor([[0.7, 0.7], [0.1, 0.2]], dtype=torch.float64)
    assert "correlation" not in rlaif.figures(b, b, a)
    assert "correlation" not in rlaif.figures(b, a, b)
    assert "correlation" not in rlaif.figures(b[:1], b[:1], b[:1])
    assert rlaif.figures(b, b, -b)["correlation"] == pytest.approx(-1)


# Gradients


def losses(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """L_LM and (r̂ - s)² of each row."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    outputs = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), predict=True)
    lm = rlaif.lm_losses(outputs["log_probs"], mask)
    return lm, (outputs["predicted"] - batch["scores"]) ** 2


def made(model: Path, folder: Path, **settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model to train, its LoRA off zero, and a batch."""
    given = task(model, folder, **settings)
    policy, tokenizer = rlaif.policy(given), load_tokenizer(str(model))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    rows = rlaif.rows(given.answers[:4], tokenizer, 512)
    batch = rlaif.batch(rows, pad=tokenizer.pad_token_id)
    return policy, {**batch, "scores": torch.tensor(batch["scores"])}


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every weight under training; zero where the loss does not depend on it."""
    model.zero_grad()
    loss.backward()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "score"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradients_by_finite_differences(
    either: Path, tmp_path: Path, backbone: str, part: str
) -> None:
    """Along the gradient itself, restricted to one kind of weight, in fp32."""
    model, batch = made(either, tmp_path, reward_backbone=backbone)

    def value() -> torch.Tensor:
        lm, reward = losses(model, batch)
        # The head's gradient stops where it is detached: differences see only what is left.
        return (0.0 if backbone == "detached" and part != "score" else 0.7) * reward.mean() + (
            lm.mean()
        )

    found = {n: g for n, g in gradients(model, value()).items() if part in n}
    norm = float(sum((g**2).sum() for g in found.values()) ** 0.5)
    weights = dict(model.named_parameters())

    def moved(step: float) -> float:
        with torch.no_grad():
            for name, gradient in found.items():
                weights[name] += step / norm * gradient
            result = float(value().double())
            for name, gradient in found.items():
                weights[name] -= step / norm * gradient
        return result

    step = 2e-2 / max(norm, 1.0)
    assert (moved(step) - moved(-step)) / (2 * step) == pytest.approx(norm, rel=1e-2)


@pytest.mark.parametrize("lora", [True, False])
def test_where_the_reward_term_goes(tiny_model: Path, tmp_path: Path, lora: bool) -> None:
    """Its gradient in the policy is exactly 0 unless the backbone is shared."""
    reaches = {}
    for backbone in BACKBONES:
        model, batch = made(tiny_model, tmp_path, reward_backbone=backbone, lora=lora)
        found = gradients(model, losses(model, batch)[1].mean())
        parts: dict[str, list[bool]] = {"policy": [], "copy": [], "head": []}
        for name, gradient in found.items():
            part = "copy" if ".score_backbone." in f".{name}" else "policy"
            parts["head" if ".score." in f".{name}" else part].append(bool(gradient.any()))
        assert all(parts["head"])
        assert bool(parts["copy"]) == (backbone == "separate")
        assert parts["policy"]
        reaches[backbone] = (any(parts["policy"]), any(parts["copy"]))
        lm = gradients(model, losses(model, batch)[0].mean())
        assert not any(bool(g.any()) for n, g in lm.items() if "score" in n)
    assert reaches == {
        "shared": (True, False),
        "detached": (False, False),
        "separate": (False, True),
    }


def token_mean(log_probs: Any, attention_mask: Any) -> Any:
    """What transformers' own loss does: every token of the batch weighs the same."""
    lm, counts = REAL(log_probs, attention_mask), attention_mask.sum(-1) - 1
    return lm * counts / counts.float().mean()


REAL = rlaif.lm_losses


@pytest.mark.parametrize("lm_losses", [REAL, token_mean])
def test_neither_padding_nor_company_changes_a_gradient(
    either: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lm_losses: Callable[..., Any]
) -> None:
    """Four rows at once, padded on either side, against each alone; a token mean fails it."""
    monkeypatch.setattr(rlaif, "lm_losses", lm_losses)
    model, batch = made(either, tmp_path)

    def gradient(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        lm, reward = losses(model, batch)
        return {n: g.double() for n, g in gradients(model, (lm + reward).mean()).items()}

    def left(row: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return row.roll(int((mask == 0).sum()))

    together = gradient(batch)
    lefts = {
        k: torch.stack([left(r, m) for r, m in zip(v, batch["attention_mask"], strict=True)])
        for k, v in batch.items()
        if k != "scores"
    }
    turned = gradient({**batch, **lefts})
    alone: dict[str, torch.Tensor] = {}
    for i in range(4):
        size = int(batch["attention_mask"][i].sum())
        row = {k: v[i : i + 1] if v.ndim == 1 else v[i : i + 1, :size] for k, v in batch.items()}
        for name, part in gradient(row).items():
            alone[name] = alone.get(name, 0) + part / 4
    size = distance(together, {n: torch.zeros_like(g) for n, g in together.items()})
    assert distance(together, turned) < 1e-4 * size
    assert (distance(together, alone) < 1e-4 * size) == (lm_losses is REAL)


# Whole trainings


@pytest.mark.parametrize("lm_losses", [REAL, token_mean])
def test_accumulation_changes_nothing(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lm_losses: Callable[..., Any],
) -> None:
    """Four rows at once, two, or one; a token mean fails it."""
    monkeypatch.setattr(rlaif, "lm_losses", lm_losses)
    logs = {
        size: train(tiny_model, tmp_path / str(size), micro_batch_size=size, epochs=2.0)
        for size in (4, 2, 1)
    }
    start = {n: torch.zeros_like(t) for n, t in trained(tmp_path / "4").items()}
    for size in (2, 1):
        apart = distance(trained(tmp_path / "4"), trained(tmp_path / str(size)))
        close = apart < 1e-4 * distance(trained(tmp_path / "4"), start)
        assert close == (lm_losses is REAL)
        for one, other in zip(logs[4], logs[size], strict=True):
            same = all(
                one[key] == pytest.approx(other[key], rel=1e-3) for key in one if key != "epoch"
            )
            assert same or lm_losses is token_mean


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_training_continued_in_the_middle_is_the_same(
    tiny_model: Path, tmp_path: Path, backbone: str
) -> None:
    whole = train(tiny_model, tmp_path / "a", epochs=2.0, reward_backbone=backbone)
    folder = tmp_path / "b"
    shutil.copytree(tmp_path / "a", folder)
    shutil.rmtree(folder / "adapter")
    Trained(folder).head.unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    assert (folder / "checkpoints" / "checkpoint-2").is_dir()
    assert train(tiny_model, folder, epochs=2.0, reward_backbone=backbone) == whole
    assert distance(trained(tmp_path / "a"), trained(folder)) == 0.0


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_adapter_is_an_ordinary_one(either: Path, tmp_path: Path, backbone: str) -> None:
    folder = tmp_path / "run"
    train(either, folder, reward_backbone=backbone)
    names = sorted(path.name for path in (folder / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    config = read_json(folder / "adapter" / "adapter_config.json")
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)
    assert not any("score" in name for name in load_file(folder / ADAPTER))
    assert not any("score" in name for name in config["target_modules"])
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        base = load_model(str(either), torch.float32)(input_ids=ids).logits
        aligned = load_trained(str(either), folder / "adapter", torch.float32)(input_ids=ids).logits
    assert float((base - aligned).abs().max()) > 1e-2
    head = load_file(Trained(folder).head)
    assert head["base_model.model.score.weight"].shape == (1, 64)
    assert any("score_backbone" in name for name in head) == (backbone == "separate")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_model_trained_whole_is_an_ordinary_one(
    either: Path, tmp_path: Path, backbone: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "run"
    train(either, folder, reward_backbone=backbone, lora=False, learning_rate=1e-3)
    _, report = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    head = load_file(Trained(folder).head)
    assert head["score.weight"].shape == (1, 64)
    assert any("score_backbone" in name for name in head) == (backbone == "separate")


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("backbone", ["shared", "separate"])
def test_a_round_continues_the_round_before(
    tiny_model: Path, tmp_path: Path, backbone: str, lora: bool
) -> None:
    settings = {"reward_backbone": backbone, "lora": lora}
    train(tiny_model, tmp_path / "1", **settings)
    start = Trained(tmp_path / "1").product
    settings |= {"start": start, "learning_rate": 1e-12}
    train(tiny_model, tmp_path / "2", **settings)
    before, after = trained(tmp_path / "1"), trained(tmp_path / "2")
    assert distance(before, after) < 1e-6
    Trained(tmp_path / "1").head.unlink()  # as after sft: the policy goes on with a new head
    train(tiny_model, tmp_path / "3", **settings)
    anew = trained(tmp_path / "3")
    moved = {name for name in before if float((before[name] - anew[name]).abs().max()) > 1e-6}
    assert moved
    assert all(reward_head.part_of_head(name) for name in moved)


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("backbone", ["shared", "separate"])
def test_what_saves_memory_trains_alike(
    either: Path, tmp_path: Path, backbone: str, settings: dict[str, Any]
) -> None:
    """Checkpointing exactly, bf16 roughly, with head and adapter in fp32."""
    plain = train(either, tmp_path / "a", epochs=2.0, reward_backbone=backbone)
    logs = train(either, tmp_path / "b", epochs=2.0, reward_backbone=backbone, **settings)
    tolerance = 0.05 if "precision" in settings else 1e-5
    assert logs[-1]["lm_loss"] == pytest.approx(plain[-1]["lm_loss"], rel=tolerance)
    assert logs[-1]["reward_loss"] == pytest.approx(plain[-1]["reward_loss"], rel=4 * tolerance)
    for file in (tmp_path / "b" / ADAPTER, Trained(tmp_path / "b").head):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


def test_the_head_computes_in_fp32_under_autocast() -> None:
    head = reward_head.Head(64, 1)
    states = torch.randn(3, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = head(states), torch.nn.Linear(64, 1)(states)
    assert (found.dtype, plain.dtype) == (torch.float32, torch.bfloat16)
    expected = states.double() @ head.weight.double().T + head.bias.double()
    assert float((found - expected).abs().max()) < 1e-6


# Rows and settings


def test_a_long_answer_is_cut_at_its_end(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    whole, cut = (rlaif.rows(answers(4), tokenizer, size) for size in (512, 40))
    assert [row["score"] for row in whole] == [a.score.overall for a in answers(4)]
    assert [row["input_ids"] for row in cut] == [row["input_ids"][:40] for row in whole]
    assert max(len(row["input_ids"]) for row in whole) > 40
    assert tokenizer.decode(whole[0]["input_ids"]).endswith("Yes, 0 is a good number.<|im_end|>\n")


def test_prompts_that_fill_max_length_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompts of 8 answers fill --max_length 8"):
        train(tiny_model, tmp_path / "run", max_length=8)


def test_rows_that_fill_no_batch_are_the_last_ones(tiny_model: Path, tmp_path: Path) -> None:
    train(tiny_model, tmp_path / "a", answers(10))
    train(tiny_model, tmp_path / "b", answers(8))
    changed = answers(8)
    changed[5] = replace(changed[5], score=Score({}, 0.0))
    train(tiny_model, tmp_path / "c", changed)
    assert distance(trained(tmp_path / "a"), trained(tmp_path / "b")) == 0.0
    assert distance(trained(tmp_path / "b"), trained(tmp_path / "c")) > 1e-4


@pytest.mark.parametrize("name", ["reward_weight", "reward_scale"])
def test_negative_weights_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name} -0.1: expected a number of at least 0"):
        Config(method="rlaif", **{name: -0.1})


@pytest.mark.parametrize("backbone", ["shared", "separate"])
def test_every_step_learns_what_the_weights_answer_by_then(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str
) -> None:
    """Two rates give the same answers at the first step, which no training has touched, and
    other answers later; a rate that moves nothing gives those of the base model throughout."""
    drawn: dict[str, list[list[Any]]] = {}
    sample = LivePolicy.sample

    def kept(self: LivePolicy, *args: Any) -> Any:
        found = sample(self, *args)
        steps = drawn.setdefault(self.task.into.path.name, [])
        steps.append([(one.prompt.id, one.ids, one.score) for one in found])
        return found

    monkeypatch.setattr(LivePolicy, "sample", kept)
    for name, rate in (("still", 1e-30), ("slow", 3e-3), ("fast", 3e-2)):
        settings = {"refresh": "step", "reward_backbone": backbone, "max_new_tokens": 12}
        given = tasks.task(
            *(tiny_model, tmp_path / name),
            method="rlaif",
            prompts=tasks.prompts(4),
            epochs=3.0,
            learning_rate=rate,
            **settings,
        )
        rlaif.train(given)
        logs = tasks.logged(tmp_path / name)
        assert [row["step"] for row in logs] == [1, 2, 3, 4, 5, 6]
        lengths = [sum(len(ids) for _, ids, _ in step) for step in drawn[name]]
        assert [row["sampled_tokens"] for row in logs] == lengths
        assert [row["critic_score"] for row in logs] == pytest.approx(
            [np.mean([s.overall if s else 0.0 for _, _, s in step]) for step in drawn[name]]
        )
        assert not (tmp_path / name / ".live").exists()
    assert drawn["still"][0] == drawn["slow"][0] == drawn["fast"][0]
    assert drawn["still"][1:] != drawn["slow"][1:] != drawn["fast"][1:]
    base = {step: [ids for _, ids, _ in rows] for step, rows in enumerate(drawn["still"])}
    assert len({str(ids) for ids in base.values()}) == 6  # each step draws with its own numbers
