"""DPO's reference: the base model's numbers, computed once, kept beside the pairs, never wrong."""

import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cai_scale.errors import DataError
from cai_scale.methods import DPO_LOSSES
from cai_scale.methods import dpo as method
from cai_scale.records import Pair, json_text, read_json
from cai_scale.runs import Run
from cai_scale.training import fit, references
from cai_scale.training.callbacks import MetricsLog
from cai_scale.training.precision import Precision
from cai_scale.training.references import Reference
from cai_scale.training.task import Task
from tasks import distance, log_probabilities, logged, pairs, task, train, weights

STEPS: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 2, "steps": 20}


class Passes:
    """Counts batches: of the reference, and all that went through the model."""

    reference = 0
    forward = 0


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Passes]:
    from transformers import LlamaModel
    from trl import DPOTrainer

    counted = Passes()
    reference, forward = DPOTrainer.compute_ref_log_probs, LlamaModel.forward

    def count_reference(*arguments: Any, **named: Any) -> Any:
        counted.reference += 1
        return reference(*arguments, **named)

    def count_forward(*arguments: Any, **named: Any) -> Any:
        counted.forward += 1
        return forward(*arguments, **named)

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", count_reference)
    monkeypatch.setattr(LlamaModel, "forward", count_forward)
    yield counted


def train_live(made: Task) -> list[dict[str, Any]]:
    """The same training by TRL alone, which takes the reference anew at every step."""
    from trl import DPOConfig, DPOTrainer

    from cai_scale.training import adapters
    from cai_scale.training.models import load_tokenizer

    config = made.config
    rows = fit.whole_batches(made.pairs, config.batch_size, method.gap)
    arguments = fit.arguments(
        made,
        DPOConfig,
        rows=len(rows),
        beta=config.beta,
        loss_type=config.loss,
        max_length=config.max_length,
    )
    trainer = DPOTrainer(
        model=fit.policy(made),
        args=arguments,
        train_dataset=method.dataset(rows),
        processing_class=load_tokenizer(config.model),
        peft_config=adapters.lora(config),
    )
    fit.fit(made, trainer)
    return logged(made.into.path)


@pytest.fixture(scope="module")
def start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that is another policy than the base model."""
    folder = tmp_path_factory.mktemp("start") / "run"
    train(tiny_model, folder, pairs=pairs(), epochs=2.0, learning_rate=2e-4)
    return Run(folder).adapter


def by_hand(model: Path, rows: list[Pair]) -> list[tuple[float, float]]:
    """log π of both answers of each pair, one text at a time, in fp32."""
    import torch

    from cai_scale.training.models import load_model, load_tokenizer

    loaded, tokenizer = load_model(str(model), torch.float32), load_tokenizer(str(model))

    def total(pair: Pair, text: str) -> float:
        return float(log_probabilities(loaded, tokenizer, pair.messages, text).sum())

    return [(total(pair, pair.chosen.text), total(pair, pair.rejected.text)) for pair in rows]


def kept(folder: Path) -> list[Reference]:
    return references.content(Run(folder).round(1).references)[1]


def assert_by_hand(folder: Path, model: Path, rows: list[Pair]) -> None:
    found = kept(folder)
    assert [r.prompt_id for r in found] == [pair.prompt_id for pair in rows]
    expected = np.array(by_hand(model, rows))
    np.testing.assert_allclose([(r.chosen, r.rejected) for r in found], expected, rtol=1e-5)
    assert np.abs(expected[:, 0] - expected[:, 1]).min() > 1  # the two could not be confused


def test_training_with_the_stored_reference_is_that_with_a_live_one(
    tmp_path: Path, tiny_model: Path, start: Path
) -> None:
    """‖A - A′‖ ≤ 1e-5 ‖A - A₀‖ after 20 steps in fp32; one wrong number of 16 breaks it."""
    rows = pairs(8)
    given = {"pairs": rows, "start": start, **STEPS}
    live = train_live(task(tiny_model, tmp_path / "live", **given))
    stored = train(tiny_model, tmp_path / "stored", **given)
    assert_by_hand(tmp_path / "stored", tiny_model, rows)
    losses = [[step["loss"] for step in logs] for logs in (live, stored)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    moved = distance(weights(tmp_path / "live"), weights(start.parent))
    apart = distance(weights(tmp_path / "live"), weights(tmp_path / "stored"))
    assert apart <= 1e-5 * moved

    wrong = tmp_path / "references.json"
    key, found = references.content(Run(tmp_path / "stored").round(1).references)
    references.write(wrong, key, [replace(found[0], chosen=found[0].chosen + 1), *found[1:]])
    train(tiny_model, tmp_path / "wrong", **given, references=wrong)
    apart = distance(weights(tmp_path / "live"), weights(tmp_path / "wrong"))
    assert apart > 1e-3 * moved


@pytest.mark.parametrize("loss", [loss for loss in DPO_LOSSES if loss != "margin"])
def test_the_first_step_of_every_loss(
    tmp_path: Path, tiny_model: Path, start: Path, loss: str
) -> None:
    """From a policy that is not the reference, so that the reference counts."""
    given = {"pairs": pairs(4), "start": start, "loss": loss, **STEPS, "steps": 1}
    (live,) = train_live(task(tiny_model, tmp_path / "live", **given))
    (stored,) = train(tiny_model, tmp_path / "stored", **given)
    for figure in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected"):
        assert stored[figure] == pytest.approx(live[figure], rel=1e-4, abs=1e-6), figure
    assert stored["grad_norm"] > 0


def test_bf16_is_no_further_from_a_live_reference_than_rounding(
    tmp_path: Path, tiny_model: Path, start: Path
) -> None:
    given = {"pairs": pairs(8), "start": start, **STEPS, "steps": 8}
    given |= {"precision": Precision("bf16", "test")}
    live = train_live(task(tiny_model, tmp_path / "live", **given))
    stored = train(tiny_model, tmp_path / "stored", **given)
    exact = train(tiny_model, tmp_path / "exact", **given | {"precision": Precision("fp32", "")})
    apart, rounding = (
        np.abs([a["rewards/margins"] - b["rewards/margins"] for a, b in zip(*two, strict=True)])
        for two in ((stored, exact), (live, exact))
    )
    assert apart.mean() <= 2 * rounding.mean()


def test_one_pass_and_no_other_once_training_began(
    tmp_path: Path, tiny_model: Path, passes: Passes
) -> None:
    """8 pairs by 2 are 4 batches; each of 20 steps has two more, and no reference."""
    given = {"pairs": pairs(8), **STEPS}
    train(tiny_model, tmp_path / "run", **given)
    assert (passes.reference, passes.forward) == (4, 4 + 40)
    train_live(task(tiny_model, tmp_path / "live", **given))  # the control
    assert passes.forward == 44 + 80


@pytest.mark.parametrize("killed", [1, 3])
def test_a_killed_training_goes_on_without_a_second_pass(
    tmp_path: Path,
    tiny_model: Path,
    passes: Passes,
    monkeypatch: pytest.MonkeyPatch,
    killed: int,
) -> None:
    """Before its first checkpoint, which comes after step 2, and after it; with dropout, whose
    random numbers the pass must leave alone."""
    given = {"pairs": pairs(8), **STEPS, "steps": None, "epochs": 2.0, "lora_dropout": 0.1}
    whole = train(tiny_model, tmp_path / "whole", **given)
    assert passes.reference == 4
    log = MetricsLog.on_log

    def kill(self: Any, args: Any, state: Any, *others: Any, **named: Any) -> None:
        log(self, args, state, *others, **named)
        if state.global_step == killed:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsLog, "on_log", kill)
        train(tiny_model, tmp_path / "killed", **given)
    assert passes.reference == 8
    resumed = train(tiny_model, tmp_path / "killed", **given)
    assert passes.reference == 8
    assert [step["loss"] for step in resumed] == [step["loss"] for step in whole]
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "killed")) == 0


def another_text(rows: list[Pair]) -> list[Pair]:
    return [*rows[:-1], replace(rows[-1], rejected=replace(rows[-1].rejected, text="No idea."))]


@pytest.mark.parametrize("part", ["nothing", "weights", "tokenizer", "template", "pairs", "torn"])
def test_what_the_reference_depends_on_is_its_key(
    tmp_path: Path, tiny_model: Path, passes: Passes, part: str
) -> None:
    from tiny import save_tiny_llama

    rows, model = pairs(4), tmp_path / "model"
    given = {**STEPS, "steps": 1}
    train(tiny_model, tmp_path / "first", pairs=rows, **given)
    file = Run(tmp_path / "first").round(1).references
    assert passes.reference == 2
    shutil.copytree(tiny_model, model)
    if part == "weights":
        save_tiny_llama(model, seed=1)
    elif part == "tokenizer":  # its longest merge is not made any more
        tokenizer = read_json(model / "tokenizer.json")
        tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]
        (model / "tokenizer.json").write_text(json_text(tokenizer))
    elif part == "template":
        template = model / "chat_template.jinja"
        template.write_text(template.read_text().replace("<|im_end|>", "<|im_end|> "))
    elif part == "pairs":
        rows = another_text(rows)
    elif part == "torn":
        file.write_bytes(file.read_bytes()[:-20])
    train(model, tmp_path / "second", pairs=rows, references=file, **given)
    if part == "nothing":
        assert passes.reference == 2
        return
    assert passes.reference == 4
    found = [(r.chosen, r.rejected) for r in references.content(file)[1]]
    np.testing.assert_allclose(found, by_hand(model, rows), rtol=1e-5)


def test_settings_that_change_the_numbers_are_in_the_key(tiny_model: Path, tmp_path: Path) -> None:
    def key(precision: str = "fp32", **settings: Any) -> dict[str, Any]:
        config = task(tiny_model, tmp_path, **settings).config
        return references.key(config, precision, {"a": "b"}, [[[1], [2], [3]]])

    assert key() == key(learning_rate=1e-5, beta=0.3)
    for other in (key("bf16"), key(max_length=99), key(qlora=True)):
        assert other != key()
    references.write(tmp_path / "x.json", key(), [])
    assert references.read(tmp_path / "x.json", key()) == []
    assert references.read(tmp_path / "x.json", key("bf16")) is None
    assert references.read(tmp_path / "y.json", key()) is None


@pytest.mark.parametrize("record", [{"schema": 2}, {"schema": 1}, {"schema": 1, "pairs": [{}]}])
def test_a_file_that_is_not_as_written_is_said_so(tmp_path: Path, record: Any) -> None:
    file = tmp_path / "references.json"
    file.write_text(json_text({"key": {}, **record}))
    with pytest.raises(DataError, match="not as it was written"):
        references.content(file)
    assert references.read(file, {}) is None


@pytest.mark.parametrize("continued", [False, True])
def test_the_reference_of_a_whole_model_is_the_base_model(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    continued: bool,
) -> None:
    """By hand, where the training continues from other weights too; the base model is freed."""
    from tiny import save_tiny_llama

    rows, made = pairs(2), []
    begun = save_tiny_llama(tmp_path / "start", seed=1) if continued else tiny_model
    policy: Callable[..., Any] = fit.policy
    log = MetricsLog.on_log

    def remembered(given: Task) -> Any:
        model = policy(given)
        made.append(weakref.ref(model))
        return model

    alive = []

    def look(self: Any, *others: Any, **named: Any) -> None:
        alive.append([model() is not None for model in made])
        log(self, *others, **named)

    monkeypatch.setattr(fit, "policy", remembered)
    monkeypatch.setattr(MetricsLog, "on_log", look)
    given = {"pairs": rows, "lora": False, "start": begun if continued else None}
    (step,) = train(tiny_model, tmp_path / "run", **given)
    assert alive[0] == [True, False]
    assert_by_hand(tmp_path / "run", tiny_model, rows)
    ratios = np.array(by_hand(begun, rows)) - np.array(by_hand(tiny_model, rows))
    margin = 0.1 * (ratios[:, 0] - ratios[:, 1])
    assert step["rewards/margins"] == pytest.approx(margin.mean(), rel=1e-3, abs=1e-5)
    assert step["loss"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-4)
    assert (abs(margin.mean()) > 0.1) == continued
