"""Bad input: one line on stderr that says what, the value and the remedy; exit code 2; nothing
half-written. Each case starts a real process."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from processes import run_python

TRAIN = ("-m", "cai_scale.launch.train")
EXPORT = ("-m", "cai_export.cli")
SCORE = ("-m", "cai_scale.runtime.cli")


def refused(folder: Path, *command: str) -> str:
    """Run a command that must be refused; return its one line."""
    before = sorted(str(path) for path in folder.rglob("*"))
    result = run_python(*command, cwd=folder)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.stdout
    assert sorted(str(path) for path in folder.rglob("*")) == before, "something was written"
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ds_config", "zero9.json"], ["zero9.json", "zero0.json", "zero3_offload.json"]),
        (["--method", "ppo"], ["'ppo'", "dpo"]),
        (["--model", "gpt5"], ["'gpt5'", "smollm2-135m-q4"]),
        (["--model", "./nowhere"], ["'./nowhere'", "folder"]),
        (["--critic", "oracle"], ["'oracle'", "lexicon"]),
        (["--spped", "9"], ["--spped", "--help"]),
        (["--samples", "two"], ["--samples", "'two'"]),
        (["--samples", "0"], ["--samples", "at least 1"]),
        (["--batch_size", "0"], ["--batch_size", "at least 1"]),
        (["--learning_rate", "nan"], ["--learning_rate", "nan"]),
        (["--prompts", "none.jsonl"], ["none.jsonl", "does not exist"]),
        (["--prompts", "empty.jsonl"], ["empty.jsonl", "no rows"]),
        (["--prompts", "bad.jsonl"], ["bad.jsonl", "row 2", "`prompt`"]),
        (["--eval_prompts", "bad.jsonl"], ["bad.jsonl", "row 2", "`prompt`"]),
        (["--constitution", "none.yaml"], ["none.yaml", "does not exist"]),
        (["--constitution", "bad.yaml"], ["bad.yaml", "colour"]),
        (["--recipe", "fast.yaml"], ["fast.yaml", "quick.yaml"]),
        (["--output", "file.txt"], ["file.txt", "is a file"]),
        (["--output", "model", "--overwrite"], ["model", "not a run's"]),
        (["--output", "x" * 5000], ["File name too long"]),
        (["--prompts", "x" * 5000 + ".jsonl"], ["File name too long"]),
        (["--ds_config", ""], ["ds_config"]),
        (["--seed", str(2**32)], ["--seed", "under 2**32"]),
        (["--temperatures", "0"], ["--temperatures", "above 0"]),
        (["--learning_rate", "0"], ["--learning_rate", "above 0"]),
        (["--batch_size", "400"], ["--batch_size 400 with 310 prompts: dpo has 310 rows"]),
        (["--report_to", "paper"], ["unknown --report_to 'paper'", "tensorboard"]),
        (["--report_to", "comet_ml"], ["--report_to comet_ml", "not installed"]),
        (["--qlora"], ["--qlora needs"]),
        (
            ["--critic", "oracle"],
            ["unknown critic 'oracle'", "lexicon, lexicon:half, judge, reward:PATH"],
        ),
        (["--critic", "reward:nothing"], ["reward:nothing", "no such folder"]),
        (["--start", "nothing"], ["nothing", "no finished run"]),
        (["--reward_weight", "-0.1"], ["--reward_weight -0.1", "at least 0"]),
        (["--max_new_tokens", "1020"], ["exceed the model's 1024"]),
        (["--prompts", "surrogate.jsonl"], ["row 1, column `id`", "surrogate"]),
        (["--output", "/proc/run"], ["/proc/run", "cannot be created"]),
        (["--output", "other"], ["other", "not a run's"]),
        (["--resume"], ["no unfinished run", "runs/"]),
        (["--resume", "--output", "nothing"], ["nothing", "holds no run"]),
        (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
    ],
)
def test_the_main_job_refuses(
    tmp_path: Path, tiny_model: Path, flags: list[str], said: list[str]
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"prompt": 7}\n')
    (tmp_path / "bad.yaml").write_text("schema: 1\ncolour: red\n")
    (tmp_path / "surrogate.jsonl").write_text('{"prompt": "x", "id": "\\ud800"}\n')
    (tmp_path / "file.txt").touch()
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    line = refused(tmp_path, *TRAIN, "--model", str(tiny_model), *flags)
    for word in said:
        assert word in line


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("chat_template.jinja", "{% for %}", "chat template refuses"),
        ("chat_template.jinja", "{{ raise_exception('no') }}", "chat template refuses"),
        ("chat_template.jinja", "{{ '' }}", "chat template renders nothing"),
        ("tokenizer.json", "{}", "cannot be loaded"),
        ("config.json", "[]", "cannot be loaded"),
    ],
)
def test_a_broken_model_folder_is_found_before_the_run_starts(
    tmp_path: Path, tiny_model: Path, name: str, content: str, said: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / name).write_text(content)
    assert said in refused(tmp_path, *TRAIN, "--model", "model")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", "{}", "not a run's"),
        ("rounds/1/pairs.jsonl", '{"prompt_id": "x"}\n', "row 1: not as it was written"),
        ("evaluation/before.jsonl", "", "does not hold the answers"),
    ],
)
def test_a_damaged_run_is_not_continued(
    tmp_path: Path, finished_run: Any, job: list[str], name: str, content: str, said: str
) -> None:
    run = copy_run(finished_run, tmp_path / "run")
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapter")
    (run / name).write_text(content)
    result = run_python(*TRAIN, *job, "--output", str(run))
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert said in result.stderr.strip().splitlines()[-1]
    assert not (run / "summary.json").exists()


def test_deepspeed_without_its_launcher_is_one_rank(tmp_path: Path, job: list[str]) -> None:
    flags = [*job, "--ds_config", "zero1.json", "--output", str(tmp_path / "run")]
    result = run_python(*TRAIN, *flags)
    assert result.returncode == 0, result.stderr
    assert "1 rank(s)" in result.stdout
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_finished_run_is_kept_unless_overwritten(
    tmp_path: Path, finished_run: Any, job: list[str]
) -> None:
    summary = finished_run.summary.read_bytes()
    line = refused(tmp_path, *TRAIN, *job, "--output", str(finished_run.path))
    assert "already holds a finished run" in line
    assert "--overwrite" in line
    assert finished_run.summary.read_bytes() == summary


def test_an_unfinished_run_continues_only_with_its_own_settings(
    tmp_path: Path, finished_run: Any, job: list[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run.path, run, ignore=shutil.ignore_patterns("bundle"))
    (run / "summary.json").unlink()
    line = refused(tmp_path, *TRAIN, *job, "--output", str(run), "--epochs", "9")
    assert "settings.epochs: 2.0 there, 9.0 here" in line


def test_resume_alone_finishes_a_run_with_the_same_result(
    tmp_path: Path, finished_run: Any
) -> None:
    """`--resume` finds the unfinished run and its settings; what is there is not made again."""
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(finished_run.path, run, ignore=shutil.ignore_patterns("bundle"))
    for name in ("summary.json", "report.html", "evaluation/after.jsonl"):
        (run / name).unlink()
    adapter = (run / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    result = run_python(*TRAIN, "--resume", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == adapter
    summary, before = (
        json.loads((p / "summary.json").read_text()) for p in (run, finished_run.path)
    )
    for part in (summary, before):
        del part["seconds"], part["peak_memory_bytes"]
    assert summary == before
    answers = [(p / "evaluation" / "after.jsonl").read_bytes() for p in (run, finished_run.path)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--merge-lora"], ["no finished run under runs/"]),
        (["--merge-lora", "--run", "nothing"], ["nothing", "holds no finished run"]),
        (["--merg"], ["--merg", "--help"]),
    ],
)
def test_the_export_refuses(tmp_path: Path, flags: list[str], said: list[str]) -> None:
    line = refused(tmp_path, *EXPORT, *flags)
    for word in said:
        assert word in line


def test_the_export_needs_merge_lora_said(tmp_path: Path, finished_run: Any) -> None:
    assert "--merge-lora" in refused(tmp_path, *EXPORT, "--run", str(finished_run.path))


def copy_run(finished_run: Any, folder: Path) -> Path:
    shutil.copytree(finished_run.path, folder, ignore=shutil.ignore_patterns("bundle"))
    return folder


def test_the_export_refuses_a_corrupt_adapter(tmp_path: Path, finished_run: Any) -> None:
    run = copy_run(finished_run, tmp_path / "run")
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = refused(tmp_path, *EXPORT, "--merge-lora", "--run", "run")
    assert "adapter run/adapter is corrupt" in line


def test_the_export_refuses_an_output_that_is_taken(tmp_path: Path, finished_run: Any) -> None:
    run = copy_run(finished_run, tmp_path / "run")
    command = (*EXPORT, "--merge-lora", "--run", str(run), "--output")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "is a file" in refused(tmp_path, *command, "file")
    assert "not a bundle's" in refused(tmp_path, *command, "full")
    (tmp_path / "full" / "x").rename(tmp_path / "full" / "manifest.json")
    assert "--overwrite" in refused(tmp_path, *command, "full")
    assert "cannot be written" in refused(tmp_path, *command, "/proc/bundle")


def test_the_export_refuses_another_base_model(
    tmp_path: Path, finished_run: Any, tiny_model: Path
) -> None:
    run = copy_run(finished_run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["weights"]["model.safetensors"] = "0" * 64
    (run / "config.json").write_text(json.dumps(config))
    line = refused(tmp_path, *EXPORT, "--merge-lora", "--run", "run")
    assert "has other weights than run was trained on" in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--response", "x"], ["--bundle"]),
        (["--bundle", "nowhere", "--response", "x"], ["nowhere is no bundle"]),
        (["--bundle", "nowhere"], ["--response", "--input"]),
    ],
)
def test_the_scorer_refuses(tmp_path: Path, flags: list[str], said: list[str]) -> None:
    line = refused(tmp_path, *SCORE, *flags)
    for word in said:
        assert word in line


def test_an_unknown_command_lists_those_that_exist(tmp_path: Path) -> None:
    line = refused(tmp_path, "-m", "cai_scale.cli", "trian")
    assert "'trian'" in line
    assert "collect, audit, train, evaluate" in line


def test_constitution_commands(tmp_path: Path, tiny_constitution: Path) -> None:
    from cai_scale import constitution

    shown = run_python("-m", "cai_scale.cli", "constitution", "show")
    assert shown.returncode == 0
    assert constitution.load().sha256 in shown.stdout
    assert "Vô hại" in shown.stdout
    checked = run_python("-m", "cai_scale.cli", "constitution", "check", str(tiny_constitution))
    assert constitution.load(tiny_constitution).sha256 in checked.stdout
    bad = tmp_path / "bad.yaml"
    bad.write_text("schema: 1\nname: x\n")
    assert "languages: the key is missing" in refused(
        tmp_path, "-m", "cai_scale.cli", "constitution", "check", str(bad)
    )
