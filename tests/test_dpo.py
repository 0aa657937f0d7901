"""DPO's numbers on a tiny model, in this process, without DeepSpeed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cai_scale.config import Config
from cai_scale.errors import ConfigError
from cai_scale.methods import load_method
from cai_scale.methods.dpo import gap
from cai_scale.ranks import Ranks
from cai_scale.records import Candidate, Pair, read_jsonl
from cai_scale.runs import Run
from cai_scale.training.fit import newest_checkpoint, whole_batches
from cai_scale.training.precision import Precision
from cai_scale.training.task import Task


def pairs(count: int = 6) -> list[Pair]:
    def candidate(text: str, score: float) -> Candidate:
        return Candidate(text=text, score=score, temperature=0.7, revised=False)

    return [
        Pair(
            prompt_id=str(i),
            language="en",
            messages=({"role": "user", "content": f"Question {i}?"},),
            chosen=candidate(f"Yes, {i} is a good number." + " Really." * i, 0.9),
            rejected=candidate(f"No idea about {i}.", 0.7),
        )
        for i in range(count)
    ]


def train(model: Path, folder: Path, rows: list[Pair], **settings: Any) -> list[dict[str, Any]]:
    config = Config(
        model=str(model),
        **{"epochs": 1.0, "batch_size": 2, "learning_rate": 3e-3, "lora_r": 4} | settings,
    )
    folder.mkdir()
    run = Run(folder)
    load_method("dpo").train(
        Task(
            config=config,
            ranks=Ranks(),
            precision=Precision("fp32", "test"),
            ds_config=None,
            into=run,
            pairs=rows,
        )
    )
    return [record for _, record in read_jsonl(run.metrics) if "loss" in record]


def test_the_first_loss_is_ln_2_and_the_margin_grows(tmp_path: Path, tiny_model: Path) -> None:
    """Policy and reference agree before the first step, so the loss is -log σ(0)."""
    logs = train(tiny_model, tmp_path / "run", pairs(), epochs=4.0)
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
        prompt = tokenizer.apply_chat_template(
            list(pair.messages), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        whole = tokenizer.apply_chat_template(
            [*pair.messages, {"role": "assistant", "content": text}], return_dict=True
        )["input_ids"]
        with torch.inference_mode():
            scores = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        places = range(len(prompt), len(whole))
        return sum(float(scores[i - 1, whole[i]]) for i in places)

    def margin(adapter: Path) -> float:
        policy = PeftModel.from_pretrained(load_model(str(tiny_model), torch.float32), adapter)
        ratios = []
        for pair in rows:
            for sign, text in ((1, pair.chosen.text), (-1, pair.rejected.text)):
                now = log_probability(policy, pair, text)
                with policy.disable_adapter():
                    ratios.append(sign * (now - log_probability(policy, pair, text)))
        return 0.1 * sum(ratios) / len(rows)

    logs = train(tiny_model, tmp_path / "run", rows, epochs=8.0)
    found = margin(tmp_path / "run" / "adapter")
    # One more step would log this margin; the cosine's last steps barely move it.
    assert logs[-1]["rewards/margins"] == pytest.approx(found, rel=0.05)
    assert found > 0.05


def test_swapped_pairs_push_the_other_way(tmp_path: Path, tiny_model: Path) -> None:
    """A control: with chosen and rejected swapped, another adapter comes out."""
    from safetensors.torch import load_file

    def adapter(name: str, rows: list[Pair]) -> dict[str, Any]:
        train(tiny_model, tmp_path / name, rows, epochs=2.0)
        return dict(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))

    rows = pairs()
    same, again = adapter("a", rows), adapter("b", rows)
    swapped = adapter("c", [replace(p, chosen=p.rejected, rejected=p.chosen) for p in rows])
    assert all(bool((same[key] == again[key]).all()) for key in same)
    moved = sum(float((same[k] - swapped[k]).norm() ** 2) for k in same) ** 0.5
    size = sum(float(v.norm() ** 2) for k, v in same.items() if "lora_B" in k) ** 0.5
    assert moved > size  # they part ways by more than either has gone


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
        train(tiny_model, tmp_path / "run", pairs(), max_length=8)


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
    train(tiny_model, tmp_path / "run", pairs())
    names = sorted(path.name for path in (tmp_path / "run" / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
