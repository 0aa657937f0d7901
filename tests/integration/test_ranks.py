"""Real ranks: the number of ranks and the ZeRO stage change neither rollouts nor training.

The ranks are started once with two processes and once with one, and train a tiny model under
all six configurations on the same pairs.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cai_scale.preferences.pairs import read_pairs
from cai_scale.prompts import load
from cai_scale.records import read_jsonl, write_jsonl
from cai_scale.runs import Run
from cai_scale.training.adapters import check_adapter
from processes import run_deepspeed, run_python

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).parent / "worker.py")
CONFIGS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


@pytest.fixture(scope="module")
def pairs_file(finished_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pairs of the tiny run, repeated to 13: three batches of four, and one left over."""
    pairs = read_pairs(finished_run.round(1).pairs)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_jsonl(path, (pairs * 13)[:13])
    return path


@pytest.fixture(scope="module")
def inputs(tiny_model: Path, tiny_constitution: Path, few_prompts: Path) -> list[str]:
    return [str(tiny_model), str(tiny_constitution), str(few_prompts)]


@pytest.fixture(scope="module")
def one_rank(inputs: list[str], pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain training in one process, and the controls: one changed pair, another learning."""
    folder = tmp_path_factory.mktemp("one")
    result = run_python(WORKER, str(folder), *inputs, str(pairs_file), "none")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def two_ranks(
    inputs: list[str], pairs_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("two")
    result = run_deepspeed(2, WORKER, str(folder), *inputs, str(pairs_file), *CONFIGS)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return folder


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {
        k: v.double() for k, v in load_file(folder / "adapter/adapter_model.safetensors").items()
    }


@pytest.fixture(scope="module")
def start(tiny_model: Path) -> dict[str, Any]:
    """A₀: the adapter before training, made as the trainer makes it."""
    import torch
    from peft import get_peft_model, get_peft_model_state_dict
    from transformers import set_seed

    from cai_scale.training.adapters import lora
    from cai_scale.training.models import load_model

    base = load_model(str(tiny_model), torch.float32)
    set_seed(0)
    state = get_peft_model_state_dict(get_peft_model(base, lora(4, 8, 0.0)))
    return {name: value.double() for name, value in state.items()}


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a.keys() == b.keys()
    return float(sum(((a[k] - b[k]) ** 2).sum() for k in a) ** 0.5)


def test_training_moves_the_adapter(one_rank: Path, start: dict[str, Any]) -> None:
    """The bound below means something only if A is far from A₀."""
    trained = weights(one_rank / "none")
    size = float(sum((v**2).sum() for v in start.values()) ** 0.5)
    assert distance(trained, start) > 0.02 * size


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_train_as_one(
    one_rank: Path, two_ranks: Path, start: dict[str, Any], name: str
) -> None:
    """‖A − A′‖ ≤ 1e-3 ‖A − A₀‖ in fp32, under every configuration."""
    plain, shared = weights(one_rank / "none"), weights(two_ranks / name)
    check_adapter(two_ranks / name / "adapter", {k: tuple(v.shape) for k, v in start.items()})
    moved = distance(plain, start)
    assert distance(plain, shared) <= 1e-3 * moved


def test_one_changed_pair_breaks_the_equality(
    one_rank: Path,
    inputs: list[str],
    pairs_file: Path,
    start: dict[str, Any],
    tmp_path: Path,
) -> None:
    """The control: the same training with chosen and rejected of one pair swapped."""
    pairs = read_pairs(pairs_file)
    pairs[5] = replace(pairs[5], chosen=pairs[5].rejected, rejected=pairs[5].chosen)
    changed = tmp_path / "pairs.jsonl"
    write_jsonl(changed, (asdict(pair) for pair in pairs))
    result = run_python(WORKER, str(tmp_path), *inputs, str(changed), "none")
    assert result.returncode == 0, result.stderr
    plain = weights(one_rank / "none")
    assert distance(plain, weights(tmp_path / "none")) > 1e-3 * distance(plain, start)


FILES = ("rollouts.jsonl", "revisions.jsonl", "pairs.jsonl")


@pytest.mark.parametrize("name", FILES)
def test_two_ranks_roll_out_as_one(one_rank: Path, two_ranks: Path, name: str) -> None:
    files = [Run(p).round(1).path / name for p in (one_rank / "none", two_ranks / CONFIGS[0])]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_size > 0


def test_one_changed_prompt_breaks_that_equality(
    one_rank: Path, inputs: list[str], pairs_file: Path, tmp_path: Path
) -> None:
    """The control: one prompt with one more word, under its old id."""
    prompts = load(inputs[2])
    rows = [{"id": p.id, "prompt": p.text, "language": p.language} for p in prompts]
    rows[3]["prompt"] = "Well, " + rows[3]["prompt"]
    changed = tmp_path / "prompts.jsonl"
    write_jsonl(changed, rows)
    result = run_python(WORKER, str(tmp_path), *inputs[:2], str(changed), str(pairs_file), "none")
    assert result.returncode == 0, result.stderr
    texts = [
        [record["text"] for _, record in read_jsonl(Run(p / "none").round(1).rollouts)]
        for p in (one_rank, tmp_path)
    ]
    assert len(texts[0]) == len(texts[1])
    assert texts[0] != texts[1]
