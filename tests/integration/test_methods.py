"""Every method, on GPT-2's and Llama's shapes: trained, exported, answering and scoring."""

import json
from pathlib import Path
from typing import Any

import pytest

from cai_scale.records import read_json, read_jsonl
from cai_scale.runs import Run
from cai_scale.verify import verify_run
from processes import run_python
from tiny import save_tiny_gpt2

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).parent / "all_methods.py")
METHODS = ("sft", "reward", "dpo", "rlaif", "grpo")
ANSWERING = [method for method in METHODS if method != "reward"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def runs(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    job: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp(f"methods-{request.param}")
    model = tiny_model if request.param == "llama" else save_tiny_gpt2(folder / "model")
    flags = [*job, "--model", str(model), "--samples", "4", "--steps", "4"]
    result = run_python(WORKER, str(folder), *flags, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return {method: Run(folder / method) for method in METHODS}


def test_every_method_has_trained(runs: dict[str, Run]) -> None:
    for method, run in runs.items():
        steps = [row for _, row in read_jsonl(run.metrics) if "loss" in row]
        assert [row["step"] for row in steps] == [1, 2, 3, 4], method
        summary = read_json(run.summary)
        assert summary["method"] == method
        assert summary["trained_parameters"] > 0
        assert summary["sampled_tokens"] > 0
        assert [link for link in verify_run(run) if link.ok is False] == []


def test_a_trained_reward_model_is_a_critic(runs: dict[str, Run]) -> None:
    """dpo's scores of its answers are other ones than the lexicon's, of the same answers."""
    scored = {}
    for method in ("sft", "dpo"):
        files = runs[method].round(1)
        scored[method] = [row["score"] for _, row in read_jsonl(files.scores(files.rollouts))]
    answers = [runs[method].round(1).rollouts.read_bytes() for method in scored]
    assert answers[0] == answers[1]
    assert scored["dpo"] != scored["sft"]
    assert read_json(runs["dpo"].config)["critic"].keys() == {f"reward:{runs['reward'].path}"}
    assert read_json(runs["dpo"].summary)["critic"] == "lexicon"  # the evaluation's, always


def test_methods_start_alike_and_end_apart(runs: dict[str, Run]) -> None:
    before = {runs[method].evaluation("before").read_bytes() for method in ANSWERING}
    assert len(before) == 1
    adapters = {(run.adapter / "adapter_model.safetensors").read_bytes() for run in runs.values()}
    assert len(adapters) == len(METHODS)


def test_every_bundle_answers_as_its_policy(runs: dict[str, Run]) -> None:
    """The export's own gates compare logits and greedy answers; here what the user types."""
    for method in ANSWERING:
        flags = ["--bundle", str(runs[method].bundle), "--prompt", "Why tides?"]
        answer = run_python("-m", "cai_scale.cli", "generate", *flags, "--max_new_tokens", "8")
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.strip()


def test_the_reward_model_scores_in_the_bundle(runs: dict[str, Run]) -> None:
    def score(method: str) -> dict[str, Any]:
        flags = ["--bundle", str(runs[method].bundle), "--prompt", "Why?", "--response", "a c n"]
        result = run_python("-m", "cai_scale.cli", "score", *flags)
        assert result.returncode == 0, result.stderr
        return dict(json.loads(result.stdout))

    assert score("sft")["scorer"] == "lexicon"
    scored = score("dpo")
    assert scored["scorer"] == "reward"
    assert 0 <= scored["reward"]["overall"] <= 1
    assert read_json(runs["dpo"].bundle / "parity.json")["reward"]["labels"] == ["overall"]


def test_a_reward_run_has_its_own_figures(runs: dict[str, Run]) -> None:
    summary = read_json(runs["reward"].summary)
    figures = summary["reward"]["labels"]["overall"]
    assert figures["pairs"] > 0
    assert 0 <= figures["accuracy"] <= 1
    assert -1 <= figures["spearman"] <= 1
    assert sum(part["n"] for part in figures["bins"]) == summary["reward"]["n"]
    assert "win" not in summary
