"""GRPO over real ranks: the same answers, rewards and training; a slow rank holds up nobody."""

import json
from pathlib import Path
from typing import Any

import pytest

from cai_scale.records import read_jsonl
from processes import run_deepspeed, run_python
from test_grpo import logs

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).parent / "grpo_worker.py")
CONFIGS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
# Few steps: where two tokens are as good as equally likely, another order of a sum draws the other,
# and from there on the policies are different ones.
SETTINGS: dict[str, Any] = {"steps": 6, "micro_batch_size": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters end its answers, so that their lengths differ."""
    from tiny import save_tiny_llama

    folder = save_tiny_llama(tmp_path_factory.mktemp("models") / "llama")
    path = folder / "generation_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, *range(60, 75)]})
    )
    return folder


def run(ranks: int, folder: Path, model: Path, settings: dict[str, Any], *configs: str) -> Any:
    words = [str(folder), str(model), json.dumps(settings), *configs]
    return run_python(WORKER, *words) if ranks == 1 else run_deepspeed(ranks, WORKER, *words)


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {
        name: value.double()
        for name, value in load_file(folder / "adapter" / "adapter_model.safetensors").items()
    }


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    return float(sum(((a[name] - b[name]) ** 2).sum() for name in a) ** 0.5)


def test_two_ranks_draw_and_learn_as_one(tmp_path: Path, model: Path) -> None:
    for seed, name in ((0, "one"), (1, "other")):
        result = run(1, tmp_path / name, model, SETTINGS | {"seed": seed}, "none")
        assert result.returncode == 0, result.stderr
    result = run(2, tmp_path / "two", model, SETTINGS, *CONFIGS)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert result.stdout.count("every rank gathers the whole weights") == 2  # under ZeRO-3
    one, other = tmp_path / "one" / "none", tmp_path / "other" / "none"
    learned = {name: value for name, value in weights(one).items() if ".lora_B." in name}
    moved = distance(learned, {name: 0 * value for name, value in learned.items()})
    figures = ("reward", "sampled_tokens", "completions/min_length", "completions/max_length")
    for name in CONFIGS:
        two = tmp_path / "two" / name
        for figure in figures:
            assert [r[figure] for r in logs(one)] == [r[figure] for r in logs(two)], figure
        losses = [[record["loss"] for record in logs(path)] for path in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-6)
        assert distance(weights(one), weights(two)) <= 1e-3 * moved
        assert not (two / ".live").exists()
    # The control: other random numbers.
    assert [r["reward"] for r in logs(one)] != [r["reward"] for r in logs(other)]
    assert distance(weights(one), weights(other)) > 1e-3 * moved


def test_a_slow_rank_meets_no_communication_timeout(tmp_path: Path, model: Path) -> None:
    """Its critic takes longer than a collective may; then the control: a collective does not."""
    settings = {"steps": 3, "slow": 35, "timeout": 20}
    result = run(2, tmp_path, model, settings, "zero3")
    said = result.stdout + result.stderr
    steps = [r["step"] for _, r in read_jsonl(tmp_path / "zero3" / "metrics.jsonl") if "loss" in r]
    assert steps == [1, 2, 3], said[-6000:]
    assert (tmp_path / "zero3" / "adapter").is_dir(), said[-6000:]
    assert result.returncode != 0 and "imed out" in said
