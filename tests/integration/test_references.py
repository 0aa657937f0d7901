"""Real ranks: DPO's reference is the same under every ZeRO stage, and computed once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cai_scale.runs import Run
from cai_scale.training import references
from processes import run_deepspeed, run_python
from tasks import distance, logged, pairs, train, weights

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).parent / "references_worker.py")
CONFIGS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
MIXED = ("zero0", "zero1", "zero3_offload")
KINDS = ("lora", "whole")


@pytest.fixture(scope="module")
def starts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter, and a whole model, that are far from the base model."""
    from tiny import save_tiny_llama

    folder = tmp_path_factory.mktemp("starts")
    train(tiny_model, folder / "run", pairs=pairs(), epochs=4.0, lora_r=16)
    return {
        "lora": Run(folder / "run").adapter,
        "whole": save_tiny_llama(folder / "other", seed=1),
    }


@pytest.fixture(scope="module")
def run(
    tiny_model: Path, starts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    def start(ranks: int, precision: str, *configs: str) -> Path:
        folder = tmp_path_factory.mktemp("references")
        words = [folder, tiny_model, starts["lora"], starts["whole"], precision, *configs]
        words = [WORKER, *map(str, words)]
        result = run_python(*words) if ranks == 1 else run_deepspeed(ranks, *words, timeout=900)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
        return folder

    return start


@pytest.fixture(scope="module")
def one(run: Callable[..., Path]) -> Path:
    return run(1, "fp32", "none") / "none"


@pytest.fixture(scope="module")
def two(run: Callable[..., Path]) -> Path:
    return run(2, "fp32", *CONFIGS)


@pytest.fixture(scope="module")
def two_bf16(run: Callable[..., Path]) -> Path:
    return run(2, "bf16", *MIXED)


def kept(folder: Path) -> Any:
    rows = references.content(Run(folder).round(1).references)[1]
    return np.array([(row.chosen, row.rejected) for row in rows])


def losses(folder: Path) -> Any:
    return np.array([step["loss"] for step in logged(folder)])


def started(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    (file,) = path.glob("*.safetensors")
    return {name: value.double() for name, value in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_have_the_reference_of_one(
    one: Path, two: Path, starts: dict[str, Path], name: str, kind: str
) -> None:
    """And train as one, in fp32, from a policy that is not the reference."""
    folder = two / name / kind
    np.testing.assert_allclose(kept(folder), kept(one / kind), rtol=1e-5)
    begun = started(starts[kind])
    # Some stages save tied weights under both their names.
    plain, shared = ({k: weights(path)[k] for k in begun} for path in (one / kind, folder))
    moved = distance(plain, begun)
    assert distance(plain, shared) <= 1e-3 * moved
    np.testing.assert_allclose(losses(folder), losses(one / kind), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_no_rank_computes_it_twice(two: Path, name: str, kind: str) -> None:
    """8 pairs on 2 ranks, one at a time: 4 batches each; then none, to the same end."""
    for suffix, expected in (("", "4"), ("-again", "0")):
        folder = two / name / (kind + suffix)
        assert [(folder / f"passes-{rank}").read_text() for rank in (0, 1)] == [expected] * 2
    assert losses(two / name / f"{kind}-again").tolist() == losses(two / name / kind).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_not_the_reference(one: Path, kind: str) -> None:
    """The control: ln 2 where it were."""
    assert abs(losses(one / kind)[0] - np.log(2)) > 0.02
    np.testing.assert_allclose(kept(one / "lora"), kept(one / "whole"), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MIXED)
def test_in_bf16_it_is_as_far_as_rounding_goes(
    one: Path, two_bf16: Path, name: str, kind: str
) -> None:
    """Sums of some 20 tokens, each of which bf16 gives to a few hundredths."""
    apart = np.abs(kept(two_bf16 / name / kind) - kept(one / kind))
    assert 1e-4 < apart.mean() < 0.5
    assert np.isfinite(losses(two_bf16 / name / kind)).all()
