"""A guard over real ranks: the same looks and the same product under every stage of ZeRO."""

from pathlib import Path
from typing import Any

import pytest

from cai_scale.records import read_json, read_jsonl
from cai_scale.runs import Run
from cai_scale.verify import verify_run
from processes import run_deepspeed, run_python
from tasks import distance, weights

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).parent / "guard_worker.py")
CONFIGS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one rank trained without DeepSpeed, and what two trained with it and without."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    result = run_python(WORKER, str(one), str(tiny_model), "none")
    assert result.returncode == 0, result.stderr[-6000:]
    words = [str(two), str(tiny_model), *CONFIGS]
    result = run_deepspeed(2, WORKER, *words, timeout=1200)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return one, two


def looks(folder: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(Run(folder).metrics) if "guard/score" in row]


def moved(folder: Path, model: Path) -> dict[str, Any]:
    """By how much the training has moved each weight: of an adapter, those that began at zero."""
    from safetensors.torch import load_file

    product = weights(folder)
    if any(".lora_B." in name for name in product):
        return {name: value for name, value in product.items() if ".lora_B." in name}
    # DeepSpeed brings a tied head along, a second time.
    start = load_file(model / "model.safetensors")
    return {name: product[name] - start[name] for name in start}


@pytest.mark.parametrize("what", ["lora", "whole"])
@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_see_and_keep_what_one_does(
    folders: tuple[Path, Path], tiny_model: Path, name: str, what: str
) -> None:
    one, two = folders[0] / f"none-{what}", folders[1] / f"{name}-{what}"
    for figure in ("step", "guard/score", "guard/words", "guard/kept"):
        assert [row[figure] for row in looks(two)] == [row[figure] for row in looks(one)], figure
    drifts = [[row["guard/kl"] for row in looks(folder)] for folder in (one, two)]
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-2, abs=1e-6)
    assert drifts[0][-1] > 1e-3
    notes = [read_json(Run(f).product / "guard.json") for f in (one, two)]  # type: ignore[operator]
    assert notes[0]["step"] == notes[1]["step"]
    found = [moved(folder, tiny_model) for folder in (one, two)]
    still = {name: 0 * value for name, value in found[0].items()}
    assert distance(*found) <= 1e-3 * distance(found[0], still)
    assert not list(two.glob(".*"))


def test_a_graph_shows_the_guard_what_the_weights_do(job: list[str], tmp_path: Path) -> None:
    """The whole job: looks from the weights by one process, from exported graphs by two ranks."""
    flags = [*job, "--steps", "4", "--guard_steps", "2", "--guard_prompts", "5"]
    flags += ["--guard_budget", "100", "--learning_rate", "0.001"]
    weights, graph = Run(tmp_path / "weights"), Run(tmp_path / "graph")
    command = ["-m", "cai_scale.launch.train", *flags, "--sampler", "transformers"]
    one = run_python(*command, "--output", str(weights.path))
    assert one.returncode == 0, one.stderr
    command = ["launch/train.py", *flags, "--sampler", "onnx", "--ds_config", "zero2.json"]
    two = run_deepspeed(2, *command, "--output", str(graph.path))
    assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-4000:]
    for figure in ("step", "guard/score", "guard/words", "guard/kept"):
        assert [row[figure] for row in looks(graph.path)] == pytest.approx(
            [row[figure] for row in looks(weights.path)]
        )
    assert [row["step"] for row in looks(graph.path)] == [0, 2, 4]
    for run in (weights, graph):
        assert run.finished and not list(run.path.glob(".*"))
        assert [link for link in verify_run(run) if link.ok is False] == []
