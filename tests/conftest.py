"""Fixtures: tiny models and data, built once a session. No network."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

# The same examples on every machine and every time, and no folder of found ones.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    """Only tests marked `gpu` see a GPU: the others mean the same on every machine."""
    if "gpu" not in config.option.markexpr or "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_constitution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import save_tiny_constitution

    return save_tiny_constitution(tmp_path_factory.mktemp("constitutions") / "tiny.yaml")


@pytest.fixture(scope="session")
def few_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten prompts of different lengths, two of them Vietnamese."""
    from cai_scale import prompts
    from cai_scale.records import write_jsonl

    chosen = prompts.load(prompts.TRAIN)[:8] + prompts.load(prompts.TRAIN)[-2:]
    path = tmp_path_factory.mktemp("prompts") / "few.jsonl"
    write_jsonl(path, ({"prompt": p.text, "language": p.language} for p in chosen))
    return path


@pytest.fixture(scope="session")
def job(tiny_model: Path, tiny_constitution: Path, few_prompts: Path) -> list[str]:
    """The flags of a main job that takes seconds."""
    return [
        *("--model", str(tiny_model)),
        *("--prompts", str(few_prompts)),
        *("--eval_prompts", str(few_prompts)),
        *("--constitution", str(tiny_constitution)),
        *("--precision", "fp32"),
        *("--margin", "0.01"),
        *("--batch_size", "4"),
        *("--max_new_tokens", "20"),
        *("--learning_rate", "0.003"),
    ]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, job: list[str]) -> Any:
    """A run of the main job as one process, without DeepSpeed."""
    from cai_scale.runs import Run
    from processes import run_python

    path = tmp_path_factory.mktemp("runs") / "tiny"
    result = run_python("-m", "cai_scale.launch.train", *job, "--output", str(path))
    assert result.returncode == 0, result.stderr
    return Run(path)


@pytest.fixture(scope="session")
def bundle(finished_run: Any) -> Path:
    """The bundle of `finished_run`, exported in a process of its own.

    A tiny model is less sure of its likeliest token than a trained one.
    """
    from processes import run_python

    flags = ["--run", str(finished_run.path), "--min-top1", "0.9"]
    result = run_python("-m", "cai_export.cli", "--merge-lora", *flags)
    assert result.returncode == 0, result.stderr
    return Path(finished_run.bundle)
