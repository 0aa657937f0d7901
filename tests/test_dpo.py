"""DPO's numbers on a tiny model, in this process, without DeepSpeed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cai_scale.errors import ConfigError
from cai_scale.methods.dpo import gap
from cai_scale.records import Pair, read_jsonl
from cai_scale.training.fit import newest_checkpoint, whole_batches
from tasks import (
    distance,
    gradient_norm,
    log_likelihoods,
    log_probabilities,
    pairs,
    train,
    weights,
)


def test_the_first_loss_is_ln_2_and_the_margin_grows(tmp_path: Path, tiny_model: Path) -> None:
    """Policy and reference agree before the first step, so the loss is -log σ(0)."""
    logs = train(tiny_model, tmp_path / "run", pairs=pairs(), epochs=4.0)
    assert logs[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert logs[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert logs[-1]["loss"] < 0.6
    assert logs[-1]["rewards/margins"] > 0.1
    assert len(logs) == 12  # 6 pairs, 2 a step, 4 epochs


def test_the_logged_margin_by_hand(tmp_path: Path, tiny_model: Path) -> None:
    """β times the difference of log-ratios, from forward passes of our own, one text at a time."""
    import torch
    from peft import PeftModel

    from cai_scale.training.models import load_model, load_tokenizer

    rows = pairs(2)
    tokenizer = load_tokenizer(str(tiny_model))

    def log_probability(model: Any, pair: Pair, text: str) -> float:
        return float(log_probabilities(model, tokenizer, pair.messages, text).sum())

    def margin(adapter: Path) -> float:
        policy = PeftModel.from_pretrained(load_model(str(tiny_model), torch.float32), adapter)
        ratios = []
        for pair in rows:
            for sign, text in ((1, pair.chosen.text), (-1, pair.rejected.text)):
                now = log_probability(policy, pair, text)
                with policy.disable_adapter():
                    ratios.append(sign * (now - log_probability(policy, pair, text)))
        return 0.1 * sum(ratios) / len(rows)

    logs = train(tiny_model, tmp_path / "run", pairs=rows, epochs=8.0)
    found = margin(tmp_path / "run" / "adapter")
    # One more step would log this margin; the cosine's last steps barely move it.
    assert logs[-1]["rewards/margins"] == pytest.approx(found, rel=0.05)
    assert found > 0.05


def test_swapped_pairs_push_the_other_way(tmp_path: Path, tiny_model: Path) -> None:
    """A control: with chosen and rejected swapped, another adapter comes out."""

    def adapter(name: str, rows: list[Pair]) -> dict[str, Any]:
        train(tiny_model, tmp_path / name, pairs=rows, epochs=2.0)
        return weights(tmp_path / name)

    rows = pairs()
    same, again = adapter("a", rows), adapter("b", rows)
    swapped = adapter("c", [replace(p, chosen=p.rejected, rejected=p.chosen) for p in rows])
    assert distance(same, again) == 0
    size = float(sum((v**2).sum() for k, v in same.items() if "lora_B" in k) ** 0.5)
    assert distance(same, swapped) > size  # they part ways by more than either has gone


@pytest.mark.parametrize("lora", [True, False])
def test_the_margin_loss_by_hand(tmp_path: Path, tiny_model: Path, lora: bool) -> None:
    """-log σ(Δℓ - m), the mean over pairs, without a reference; m = 0 gives another loss."""
    import torch

    from cai_scale.training.models import load_model, load_tokenizer

    rows = pairs(2)
    model, tokenizer = load_model(str(tiny_model), torch.float32), load_tokenizer(str(tiny_model))
    deltas = np.array(
        [
            log_probabilities(model, tokenizer, pair.messages, pair.chosen.text).sum()
            - log_probabilities(model, tokenizer, pair.messages, pair.rejected.text).sum()
            for pair in rows
        ]
    )
    settings = {"pairs": rows, "loss": "margin", "lora": lora}
    with_margin = train(tiny_model, tmp_path / "a", loss_margin=5.0, **settings)
    without = train(tiny_model, tmp_path / "b", **settings)
    assert with_margin[0]["loss"] == pytest.approx(np.log1p(np.exp(5.0 - deltas)).mean(), rel=1e-4)
    assert without[0]["loss"] == pytest.approx(np.log1p(np.exp(-deltas)).mean(), rel=1e-4)
    assert with_margin[0]["loss"] != pytest.approx(without[0]["loss"], rel=1e-2)


@pytest.mark.parametrize("loss", ["sigmoid", "margin"])
def test_the_gradient_by_finite_differences(tmp_path: Path, tiny_model: Path, loss: str) -> None:
    """The first step's, against the formula on texts one at a time; the other loss has another."""
    import torch

    rows = pairs(2)

    def by_hand(kind: str) -> Any:
        def value(model: Any, tokenizer: Any) -> Any:
            def delta() -> list[Any]:
                chosen, rejected = (
                    [log_likelihoods(model, tokenizer, p.messages, text(p)).sum() for p in rows]
                    for text in (lambda p: p.chosen.text, lambda p: p.rejected.text)
                )
                return [c - r for c, r in zip(chosen, rejected, strict=True)]

            if kind == "margin":
                gaps = [d - 5.0 for d in delta()]
            else:
                with torch.no_grad(), model.disable_adapter():
                    base = delta()
                gaps = [0.1 * (d - b) for d, b in zip(delta(), base, strict=True)]
            return -torch.nn.functional.logsigmoid(torch.stack(gaps)).mean()

        return value

    settings = {"pairs": rows, "loss": loss, "loss_margin": 5.0, "learning_rate": 1e-30}
    (step,) = train(tiny_model, tmp_path / "run", **settings)
    norms = {
        kind: gradient_norm(tiny_model, tmp_path / "run", by_hand(kind))
        for kind in ("sigmoid", "margin")
    }
    assert step["grad_norm"] == pytest.approx(norms.pop(loss), rel=1e-3)
    (other,) = norms.values()
    assert step["grad_norm"] != pytest.approx(other, rel=1e-2)


def test_the_reference_of_a_later_round_is_the_base_model(tmp_path: Path, tiny_model: Path) -> None:
    """Continued from another adapter, the first margin is already that adapter's."""
    rows = pairs()
    first = train(tiny_model, tmp_path / "a", pairs=rows, epochs=4.0)
    start = tmp_path / "a" / "adapter"
    second = train(tiny_model, tmp_path / "b", pairs=rows, batch_size=6, start=start)
    last = np.mean([step["rewards/margins"] for step in first[-3:]])
    assert second[0]["rewards/margins"] == pytest.approx(last, rel=0.05)
    assert second[0]["loss"] < 0.65  # ln 2 where the reference were the start itself


def test_rows_that_fill_no_batch_are_left_out_by_their_gap() -> None:
    rows = pairs(7)
    rows[2] = replace(rows[2], chosen=replace(rows[2].chosen, score=0.71))
    assert [p.prompt_id for p in whole_batches(rows, 3, gap)] == ["0", "1", "3", "4", "5", "6"]
    assert whole_batches(rows, 7, gap) == rows


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    for step, whole in ((5, True), (10, True), (15, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_pairs_whose_prompt_fills_max_length_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="6 pairs fill --max_length 8"):
        train(tiny_model, tmp_path / "run", pairs=pairs(), max_length=8)


def test_metrics_of_steps_that_are_made_again_are_forgotten(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from cai_scale.training.callbacks import MetricsLog

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    log = MetricsLog(path)
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    log.on_train_begin(None, state, None)
    log.on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=2), None, {"loss": 1})
    assert [r for _, r in read_jsonl(path)] == [{"step": 1, "loss": 3}, {"step": 2, "loss": 1}]


def test_only_the_adapter_is_saved(tmp_path: Path, tiny_model: Path) -> None:
    train(tiny_model, tmp_path / "run", pairs=pairs())
    names = sorted(path.name for path in (tmp_path / "run" / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
