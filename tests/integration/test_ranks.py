"""Real ranks: the number of ranks and the ZeRO stage change neither rollouts nor training.

The ranks are started once with two processes and once with one, and train a tiny model by each
method under all six configurations on the same data.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cai_scale.preferences.pairs import read_pairs
from cai_scale.prompts import load
from cai_scale.records import read_jsonl, write_jsonl
from cai_scale.runs import Run
from cai_scale.training.adapters import check_adapter
from processes import run_deepspeed, run_python
from tasks import distance, logged, weights

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).parent / "worker.py")
CONFIGS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
METHODS = ("dpo", "rlaif", "reward")
TRAINED = ",".join(METHODS)


@pytest.fixture(scope="module")
def data(finished_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run's answers, and its pairs repeated to 13: three batches of four and one over."""
    folder = tmp_path_factory.mktemp("data")
    files = finished_run.round(1)
    for file in (files.rollouts, files.scores(files.rollouts), files.audit):
        shutil.copy(file, folder)
    write_jsonl(folder / "pairs.jsonl", (read_pairs(files.pairs) * 13)[:13])
    return folder


@pytest.fixture(scope="module")
def inputs(tiny_model: Path, tiny_constitution: Path, few_prompts: Path) -> list[str]:
    return [str(tiny_model), str(tiny_constitution), str(few_prompts)]


@pytest.fixture(scope="module")
def alone(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Plain training in one process; data and methods are its arguments."""

    def train(data: Path, methods: str, prompts: Path | None = None) -> Path:
        folder = tmp_path_factory.mktemp("one")
        given = [*inputs[:2], str(prompts or inputs[2])]
        result = run_python(WORKER, str(folder), *given, str(data), methods, "none", timeout=600)
        assert result.returncode == 0, result.stderr
        return folder / "none"

    return train


@pytest.fixture(scope="module")
def one_rank(alone: Callable[..., Path], data: Path) -> Path:
    return alone(data, TRAINED)


@pytest.fixture(scope="module")
def two_ranks(inputs: list[str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    flags = [str(folder), *inputs, str(data), TRAINED, *CONFIGS]
    result = run_deepspeed(2, WORKER, *flags, timeout=1200)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A₀ of each method: what comes out of a training with a rate that moves nothing."""
    from tasks import answers, pairs, train

    folder = tmp_path_factory.mktemp("start")
    found = {}
    for method in METHODS:
        train(
            *(tiny_model, folder / method),
            method=method,
            pairs=pairs(2),
            answers=answers(2),
            steps=1,
            learning_rate=1e-30,
            lora_r=4,
            lora_alpha=8,
            reward_outputs="principles",
        )
        found[method] = weights(folder / method)
    return found


def losses(folder: Path) -> Any:
    return np.array([record["loss"] for record in logged(folder)])


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_adapter(one_rank: Path, start: dict[str, Any], method: str) -> None:
    """The bounds below mean something only if A is far from A₀."""
    trained = weights(one_rank / method)
    size = float(sum((v**2).sum() for v in start[method].values()) ** 0.5)
    assert distance(trained, start[method]) > 0.02 * size
    assert len(losses(one_rank / method)) == 20


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_train_as_one(
    one_rank: Path, two_ranks: Path, start: dict[str, Any], name: str, method: str
) -> None:
    """The same losses to 1e-3, and ‖A - A′‖ ≤ 1e-3 ‖A - A₀‖, in fp32, everywhere."""
    plain, shared = weights(one_rank / method), weights(two_ranks / name / method)
    shapes = {key: tuple(value.shape) for key, value in start[method].items()}
    check_adapter(two_ranks / name / method / "adapter", shapes)
    assert distance(plain, shared) <= 1e-3 * distance(plain, start[method])
    np.testing.assert_allclose(
        losses(two_ranks / name / method), losses(one_rank / method), rtol=1e-3
    )


def test_one_changed_row_breaks_the_equality(
    one_rank: Path,
    alone: Callable[..., Path],
    data: Path,
    start: dict[str, Any],
    tmp_path: Path,
) -> None:
    """The control: one pair's answers swapped, and one answer's score moved by .2."""
    changed = Path(shutil.copytree(data, tmp_path / "data"))
    pairs = read_pairs(changed / "pairs.jsonl")
    pairs[5] = replace(pairs[5], chosen=pairs[5].rejected, rejected=pairs[5].chosen)
    write_jsonl(changed / "pairs.jsonl", (asdict(pair) for pair in pairs))
    rows = [record for _, record in read_jsonl(changed / "rollouts.scores.jsonl")]
    for row in rows[:8]:
        for scores in (row["score"], row["score"]["principles"]):
            for name, value in scores.items():
                if isinstance(value, float):
                    scores[name] = abs(value - 0.2)
    write_jsonl(changed / "rollouts.scores.jsonl", rows)
    other = alone(changed, TRAINED)
    for method in METHODS:
        plain = weights(one_rank / method)
        bound = 1e-3 * distance(plain, start[method])
        assert distance(plain, weights(other / method)) > bound, method
        gap = np.abs(losses(other / method) / losses(one_rank / method) - 1).max()
        assert gap > 1e-3, method


FILES = (
    *("rollouts.jsonl", "rollouts.scores.jsonl", "revisions.jsonl", "revisions.scores.jsonl"),
    "pairs.jsonl",
)


@pytest.mark.parametrize("name", FILES)
def test_two_ranks_roll_out_as_one(one_rank: Path, two_ranks: Path, name: str) -> None:
    runs = (one_rank / "dpo", two_ranks / CONFIGS[0] / "dpo")
    files = [Run(path).round(1).path / name for path in runs]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_size > 0


def test_one_changed_prompt_breaks_that_equality(
    one_rank: Path, alone: Callable[..., Path], inputs: list[str], data: Path, tmp_path: Path
) -> None:
    """The control: one prompt with one more word, under its old id."""
    prompts = load(inputs[2])
    rows = [{"id": p.id, "prompt": p.text, "language": p.language} for p in prompts]
    rows[3]["prompt"] = "Well, " + rows[3]["prompt"]
    changed = tmp_path / "prompts.jsonl"
    write_jsonl(changed, rows)
    other = alone(data, "dpo", changed)
    texts = [
        [record["text"] for _, record in read_jsonl(Run(p / "dpo").round(1).rollouts)]
        for p in (one_rank, other)
    ]
    assert len(texts[0]) == len(texts[1])
    assert texts[0] != texts[1]


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_what_is_trained_is_fp32_where_the_model_computes_in_bf16(
    job: list[str], tmp_path: Path, name: str
) -> None:
    """The saved adapter is the optimizer's, not the copy in 16 bits that the products take."""
    import torch

    flags = ["--precision", "bf16", "--ds_config", f"{name}.json", "--steps", "2"]
    output = str(tmp_path / "run")
    command = ["-m", "cai_scale.cli", "train", *job, *flags, "--output", output]
    result = run_python(*command)
    assert result.returncode == 0, result.stderr
    from safetensors.torch import load_file

    for tensor in load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").values():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, tensor.bfloat16().float())


JOIN = """
import os, sys
import torch, deepspeed
from cai_scale import ranks
here = ranks.from_environment()
if "ours" in sys.argv:  # the launcher puts --local_rank before it
    ranks.join(here, deepspeed=True)
else:
    torch.distributed.init_process_group("gloo", rank=here.rank, world_size=here.world)
    deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)
ones = torch.ones(4096)
deepspeed.comm.inference_all_reduce(ones)
torch.distributed.barrier()
assert ones.sum() == 8192, ones
print("PORT", os.environ["MASTER_PORT"])
ranks.leave()
"""


@pytest.mark.parametrize(("who", "left"), [("ours", 0), ("deepspeed", 2)])
def test_deepspeed_s_buffers_do_not_outlive_the_ranks(who: str, left: int, tmp_path: Path) -> None:
    """By itself DeepSpeed leaves those of both ranks; where it does no longer, ours can go."""
    script = tmp_path / "join.py"
    script.write_text(JOIN)
    result = run_deepspeed(2, str(script), who)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    port = result.stdout.split("PORT ")[1].split()[0]
    buffers = list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
    for buffer in buffers:
        buffer.unlink()
    assert len(buffers) == left
