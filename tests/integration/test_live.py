"""Methods that sample at every step, from graphs of the policy as it is by then."""

from pathlib import Path
from typing import Any

import pytest

from cai_scale.records import read_jsonl
from cai_scale.runs import Run
from cai_scale.verify import verify_run
from processes import run_deepspeed, run_python

pytestmark = pytest.mark.slow

METHODS = {"grpo": ["--method", "grpo"], "rlaif": ["--method", "rlaif", "--refresh", "step"]}
CONFIGS = {"grpo": "zero3.json", "rlaif": "zero2.json"}


def figures(run: Run, name: str) -> list[Any]:
    return [row[name] for _, row in read_jsonl(run.metrics) if "loss" in row]


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_answers_as_the_weights_do(job: list[str], tmp_path: Path, method: str) -> None:
    """The same tokens and scores at every step, by one process from the weights under training,
    and by two ranks from a graph that is exported at every step."""
    flags = [*job, *METHODS[method], "--samples", "2", "--steps", "3"]
    weights, graph = Run(tmp_path / "weights"), Run(tmp_path / "graph")
    command = ["-m", "cai_scale.launch.train", *flags]
    one = run_python(*command, "--sampler", "transformers", "--output", str(weights.path))
    assert one.returncode == 0, one.stderr
    command = [*flags, "--sampler", "onnx", "--ds_config", CONFIGS[method]]
    two = run_deepspeed(2, "launch/train.py", *command, "--output", str(graph.path))
    assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-4000:]
    score = "reward" if method == "grpo" else "critic_score"
    for name in ("sampled_tokens", score):
        assert figures(graph, name) == pytest.approx(figures(weights, name), rel=1e-6)
    assert figures(weights, "sampled_tokens")[0] > 0
    assert not list(graph.path.glob(".live*")) and not list(graph.path.glob(".policy*"))
    for run in (weights, graph):
        assert [link for link in verify_run(run) if link.ok is False] == []
    # The control: with another seed, other answers. And no graph is left where nothing follows.
    other = Run(tmp_path / "other")
    command = ["-m", "cai_scale.cli", "train", *flags, "--sampler", "onnx", "--seed", "1"]
    assert run_python(*command, "--output", str(other.path)).returncode == 0
    assert figures(other, score) != pytest.approx(figures(weights, score), rel=1e-6)
    assert not list(other.path.glob(".policy*"))
