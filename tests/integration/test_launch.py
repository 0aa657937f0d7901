"""The main job as a user starts it: the deepspeed launcher, an export, a score."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from processes import ROOT, run_deepspeed, run_python

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", [2, 3])
def test_the_launcher_runs_the_job_on_two_ranks(
    tmp_path: Path, job: list[str], finished_run: Any, stage: int
) -> None:
    """Collect, train under ZeRO, evaluate: the figures of one process without DeepSpeed."""
    flags = [*job, "--ds_config", f"zero{stage}.json", "--output", str(tmp_path / "run")]
    result = run_deepspeed(2, "launch/train.py", *flags)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "2 rank(s) on" in result.stdout
    assert f"DeepSpeed zero{stage}.json" in result.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    alone = json.loads(finished_run.summary.read_text())
    for key in ("before", "win", "loss", "tie", "n"):
        assert summary[key] == alone[key]
    assert summary["after"]["overall"] == pytest.approx(alone["after"]["overall"], abs=1e-9)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["ranks"] == {"world": 2}
    assert config["ds_config"]["zero_optimization"]["stage"] == stage
    assert len(config["weights"]["model.safetensors"]) == 64
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert page.count("<svg") == page.count("<figure>") > 5
    assert "http" not in page.replace("http-equiv", "")


def test_a_mistake_under_the_launcher_is_one_line_and_exit_code_2(
    tmp_path: Path, tiny_model: Path
) -> None:
    result = run_deepspeed(
        2,
        "launch/train.py",
        *("--model", str(tiny_model), "--prompts", str(tmp_path / "none.jsonl")),
        *("--output", str(tmp_path / "run")),
    )
    assert result.returncode == 2
    said = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(said) == 1
    assert "none.jsonl does not exist" in said[0]
    assert "Traceback" not in result.stderr + result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_a_killed_run_continues_to_the_same_result(
    tmp_path: Path, job: list[str], finished_run: Any
) -> None:
    """Killed while it trains, started again with the same flags: the same adapter."""
    from safetensors.torch import load_file

    run = tmp_path / "run"
    command = [sys.executable, "-m", "cai_scale.launch.train", *job, "--output", str(run)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not any((run / "checkpoints").glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None, "it ended before its first checkpoint"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert not (run / "summary.json").exists()
    again = run_python(*command[1:])
    assert again.returncode == 0, again.stderr
    assert "continues in" in again.stdout
    states = [load_file(p / "adapter/adapter_model.safetensors") for p in (run, finished_run.path)]
    assert all(bool((states[0][k] == states[1][k]).all()) for k in states[1])
    texts = [p.joinpath("evaluation/after.jsonl").read_bytes() for p in (run, finished_run.path)]
    assert texts[0] == texts[1]
