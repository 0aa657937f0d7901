"""Rounds, whole models and a start from another run, by the main job on a tiny model."""

from pathlib import Path
from typing import Any

import pytest

from cai_scale.records import read_json, read_jsonl, sha256
from cai_scale.runs import Run
from cai_scale.verify import verify_run
from processes import run_python

pytestmark = pytest.mark.slow


def main_job(*flags: str) -> Any:
    return run_python("-m", "cai_scale.launch.train", *flags)


def broken(run: Run) -> dict[str, str]:
    return {link.name: link.said for link in verify_run(run) if link.ok is False}


@pytest.fixture(scope="module")
def two_rounds(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("rounds") / "run"
    result = main_job(*job, "--rounds", "2", "--epochs", "1", "--output", str(path))
    assert result.returncode == 0, result.stderr
    return Run(path)


def test_a_later_round_samples_from_the_policy_as_it_is_then(two_rounds: Run) -> None:
    texts = [
        [record["text"] for _, record in read_jsonl(two_rounds.round(number).rollouts)]
        for number in (1, 2)
    ]
    assert len(texts[0]) == len(texts[1]) == 80
    assert sum(a != b for a, b in zip(*texts, strict=True)) > 40
    rounds = {record["round"] for _, record in read_jsonl(two_rounds.round(2).rollouts)}
    assert rounds == {2}
    first = two_rounds.round(1).adapter / "adapter_model.safetensors"
    assert sha256(first) != sha256(two_rounds.adapter / "adapter_model.safetensors")


def test_every_round_is_in_the_chain(two_rounds: Run) -> None:
    links = {link.name: link.said for link in verify_run(two_rounds)}
    assert {"rollout 2", "revise 2", "pair 2", "train 2"} <= links.keys()
    assert broken(two_rounds) == {}
    trace = run_python(
        *("-m", "cai_scale.cli", "trace", "--run", str(two_rounds.path), "--round", "2"),
        next(record["id"] for _, record in read_jsonl(two_rounds.prompts("train"))),
    )
    assert trace.returncode == 0, trace.stderr


def test_a_changed_round_is_found(two_rounds: Run) -> None:
    """The control: a byte in the adapter from which the second round sampled."""
    file = two_rounds.round(1).adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert list(broken(two_rounds)) == ["train"]
    file.write_bytes(content)


def test_a_killed_run_of_rounds_ends_as_the_other(
    two_rounds: Run, job: list[str], tmp_path: Path
) -> None:
    """Without the second round's training and what follows, the same adapter comes out again."""
    import shutil

    copy = Run(shutil.copytree(two_rounds.path, tmp_path / "run"))
    expected = sha256(copy.adapter / "adapter_model.safetensors")
    for path in (copy.adapter, copy.checkpoints, copy.path / "evaluation"):
        shutil.rmtree(path)
    for path in (copy.summary, copy.report, copy.metrics, copy.round(2).pairs):
        path.unlink()
    (copy.path / ".policy-base.taken").mkdir()  # killed while it exported
    (copy.path / ".policy-base.partial").mkdir()
    result = main_job("--resume", "--output", str(copy.path))
    assert result.returncode == 0, result.stderr
    assert sha256(copy.adapter / "adapter_model.safetensors") == expected


def test_a_start_from_a_run_of_sft(job: list[str], tmp_path: Path) -> None:
    result = main_job(*job, "--method", "sft", "--output", str(tmp_path / "sft"))
    assert result.returncode == 0, result.stderr
    flags = ["--start", str(tmp_path / "sft"), "--output", str(tmp_path / "dpo")]
    result = main_job(*job, *flags)
    assert result.returncode == 0, result.stderr
    sft, dpo = Run(tmp_path / "sft"), Run(tmp_path / "dpo")
    before = [run.evaluation("before").read_bytes() for run in (sft, dpo)]
    assert before[0] == before[1]  # the base model, with and without a start
    assert sft.round(1).rollouts.read_bytes() != dpo.round(1).rollouts.read_bytes()
    start = read_json(dpo.config)["start"]
    assert start == {"adapter_model.safetensors": sha256(sft.adapter / "adapter_model.safetensors")}
    assert broken(sft) == broken(dpo) == {}
    result = main_job(*job, "--no-lora", *flags[:2], "--output", str(tmp_path / "other"))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "is not a model; give --lora" in result.stderr


def test_a_whole_model_is_trained_and_exported(job: list[str], tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    result = main_job(*job, "--no-lora", "--output", str(run.path))
    assert result.returncode == 0, result.stderr
    names = {path.name for path in run.model.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert not run.adapter.exists()
    result = run_python("-m", "cai_export.cli", "--run", str(run.path), "--min-top1", "0.9")
    assert result.returncode == 0, result.stderr
    assert broken(run) == {}
    parity = read_json(run.bundle / "parity.json")
    worst = parity["variants"]["fp32"]["graph"]["max_abs_logit_delta"]
    assert max(v for modes in worst.values() for v in modes.values()) < 1e-3


def test_a_margin_that_leaves_too_few_pairs(job: list[str], tmp_path: Path) -> None:
    """One line that counts them; nothing is trained, and methods without pairs go on."""
    run = Run(tmp_path / "run")
    result = main_job(*job, "--margin", "0.9", "--output", str(run.path))
    assert result.returncode == 2, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: 0 pairs from 10 prompts, under the batch size 4; ")
    assert "--margin" in line
    assert run.product is None
    rewards = [*job, "--method", "sft", "--margin", "0.9", "--output", str(tmp_path / "sft")]
    assert run_python("-m", "cai_scale.cli", "train", *rewards).returncode == 0
