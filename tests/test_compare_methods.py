"""`cai-scale compare`: the table, the plot, and what is refused; one real comparison."""

import json
from pathlib import Path
from typing import Any

import pytest

from cai_scale import compare, constitution
from cai_scale.errors import ConfigError
from cai_scale.records import read_json, read_jsonl
from processes import run_python

RULES = constitution.load()


def summary(after: float, **given: Any) -> dict[str, Any]:
    ids = [principle.id for principle in RULES.principles]
    delta = round(after - 0.7, 6)
    return {
        "model": "tiny",
        "n": 10,
        "before": {"overall": 0.7, "principles": dict.fromkeys(ids, 0.7)},
        "after": {"overall": after, "principles": dict.fromkeys(ids, after)},
        "delta": {
            "overall": delta,
            "principles": dict.fromkeys(ids, delta),
            "ci95": [delta - 0.01, delta + 0.02],
            "principles_ci95": {name: [delta - 0.01, delta + 0.02] for name in ids},
        },
        "win": 6,
        "loss": 3,
        "tie": 1,
        "drift": {"before": {"words": 50.0}, "after": {"words": 55.25}},
        "seconds": {"rollout": 10.0, "train": 4.0, "train 2": 2.5},
        "peak_memory_bytes": 1_500_000_000,
        "sampled_tokens": 12_345,
        "trained_parameters": 4_884_480,
        **given,
    }


def test_the_table_line_by_line() -> None:
    rows = compare.rows({"rlaif": summary(0.69), "dpo": summary(0.75)}, RULES)
    assert [row[0] for row in rows[:5]] == [
        *("Harmless", "Helpful", "Honest", "Respectful", "Overall")
    ]
    figures = {row[0]: row[1:] for row in rows}
    assert figures["Overall"] == ("0.7000 → 0.6900 (-0.0100)", "0.7000 → 0.7500 (+0.0500)")
    assert figures["95 % interval of Δ"][1] == "[+0.0400, +0.0700]"
    assert figures["Wins / losses / ties"][0] == "6 / 3 / 1"
    assert figures["Words per answer"][0] == "50.0 → 55.2"
    assert figures["Trained parameters"][0] == "4,884,480"
    assert figures["Seconds, all stages"][0] == "16"
    assert figures["Seconds of training"][0] == "6"
    assert figures["Peak memory, GB"][0] == "1.50"


def test_the_plot_is_drawn_from_the_figures(tmp_path: Path) -> None:
    """Equal figures give equal pictures, and other figures others."""
    pictures = []
    for after in (0.75, 0.75, 0.65):
        path = tmp_path / "plot.png"
        compare.plot({"rlaif": summary(0.71), "dpo": summary(after)}, RULES, path)
        pictures.append(path.read_bytes())
    assert pictures[0].startswith(b"\x89PNG")
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--methods", "dpo"], "--methods dpo: expected two or more"),
        (["--methods", "dpo,dpo"], "expected two or more, each once"),
        (["--methods", "dpo,reward"], "of dpo, sft, rlaif, grpo"),
        (["--methods", "dpo,ppo"], "--methods dpo,ppo"),
        (["--method", "dpo"], "name the methods with --methods"),
        (["--steps", "100"], "need 800 prompts, train has 310"),
        (["--samples", "1"], "--samples 1: dpo compares"),
    ],
)
def test_a_wrong_comparison_is_refused(tmp_path: Path, flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match="") as caught:
        compare.main(["--output", str(tmp_path), *flags])
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_methods_from_the_same_start(job: list[str], tmp_path: Path) -> None:
    flags = ["--methods", "sft,dpo", "--steps", "2", "--output", str(tmp_path / "both")]
    result = run_python("-m", "cai_scale.cli", "compare", *job, *flags, timeout=600)
    assert result.returncode == 0, result.stderr
    found = read_json(tmp_path / "both" / "compare.json")
    assert list(found) == ["sft", "dpo"]
    assert found["sft"]["before"] == found["dpo"]["before"]
    assert found["sft"]["sampled_tokens"] == found["dpo"]["sampled_tokens"] > 0
    for name in found:
        run = tmp_path / "both" / name
        steps = [row["step"] for _, row in read_jsonl(run / "metrics.jsonl") if "loss" in row]
        assert steps == [1, 2]
        assert len(list(read_jsonl(run / "prompts" / "train.jsonl"))) == 8  # 2 steps of 4
    tensors = (tmp_path / "both" / "dpo" / "adapter" / "adapter_model.safetensors").read_bytes()
    header = json.loads(tensors[8 : 8 + int.from_bytes(tensors[:8], "little")])
    sizes = [t["shape"][0] * t["shape"][1] for n, t in header.items() if n != "__metadata__"]
    assert found["dpo"]["trained_parameters"] == sum(sizes)
    again = run_python("-m", "cai_scale.cli", "compare", *job, *flags)  # nothing is run again
    assert again.returncode == 0, again.stderr
    assert "…" not in again.stdout.split("┏")[0]
