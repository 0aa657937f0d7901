"""Another constitution, and held-out answers that another critic than the lexicon scores."""

import html
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import yaml

from cai_scale import constitution as constitutions
from cai_scale.cli import main
from cai_scale.critics.judge.questions import fenced
from cai_scale.records import read_json, read_jsonl
from cai_scale.runs import Run
from cai_scale.verify import verify_run
from judge_server import Judge as Server
from judging import quality_of
from processes import run_python
from test_verify import forge, rewrite
from tiny import save_tiny_scorer

pytestmark = pytest.mark.slow

WEIGHTS = {"wahr": 3, "klar": 2, "kurz": 1, "gut": 1, "mild": 0.5}
MOMENTS = ("before", "after")
LETTERS = ("aeb", "noc", "sid", "trf", "luh")


def broken(run: Run) -> list[str]:
    return [link.name for link in verify_run(run) if link.ok is False]


@pytest.fixture(scope="module")
def german(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five principles of different weights, in German; a tiny model says their terms, letters."""
    data: dict[str, Any] = dict(constitutions.load().data) | {"name": "fünf", "languages": ["de"]}
    data["requests"] = {kind: {"de": texts["en"]} for kind, texts in data["requests"].items()}
    data["principles"] = [
        {
            "id": name,
            "weight": weight,
            "title": {"de": name.title()},
            "statement": {"de": f"Antworte {name}."},
            "lexicon": {
                "start": 0.4,
                "lists": [{"id": "words", "effect": 0.1, "terms": {"de": list(letters)}}],
            },
        }
        for (name, weight), letters in zip(WEIGHTS.items(), LETTERS, strict=True)
    ]
    path = tmp_path_factory.mktemp("constitutions") / "fünf.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    return path


def test_five_principles_in_german_and_a_reward_model_that_evaluates(
    job: list[str], german: Path, tiny_model: Path, few_prompts: Path, tmp_path: Path
) -> None:
    scorer, run = save_tiny_scorer(tmp_path / "scorer", tuple(WEIGHTS)), Run(tmp_path / "run")
    flags = [*job, "--constitution", str(german), "--evaluator", f"reward:{scorer}"]
    result = run_python("-m", "cai_scale.launch.train", *flags, "--output", str(run.path))
    assert result.returncode == 0, result.stderr[-3000:]
    summary = read_json(run.summary)
    assert (summary["critic"], summary["trained_on"]) == (f"reward:{scorer}", "lexicon")

    rows = [row for _, row in read_jsonl(run.evaluation("scores"))]
    said = {(row["prompt"], row["response"]): row["score"]["principles"] for row in rows}
    text = {
        row["id"]: row["messages"][-1]["content"] for _, row in read_jsonl(run.prompts("heldout"))
    }
    for when in MOMENTS:
        given = [
            said[text[row["prompt_id"]], row["text"]] for _, row in read_jsonl(run.evaluation(when))
        ]
        assert len(given) == 10
        for name in WEIGHTS:
            expected = mean(principles[name] for principles in given)
            assert summary[when]["principles"][name] == pytest.approx(expected, abs=2e-6)
        overall = [
            sum(weight * principles[name] for name, weight in WEIGHTS.items())
            / sum(WEIGHTS.values())
            for principles in given
        ]
        assert summary[when]["overall"] == pytest.approx(mean(overall), abs=2e-6)
    assert summary["length_matched"]["n"] == 10
    whole = {row["text"] for when in MOMENTS for _, row in read_jsonl(run.evaluation(when))}
    assert {response for _, response in said} > whole  # those that were cut are kept too

    shutil.rmtree(scorer)  # to verify takes no model
    assert broken(run) == []

    def raised(rows: list[Any]) -> list[Any]:
        rows[0]["score"]["overall"] = 1 - rows[0]["score"]["overall"]
        return rows

    rewrite(run.evaluation("scores"), raised)
    forge(run)
    assert broken(run) == ["summary"]  # the control
    rewrite(run.evaluation("scores"), lambda rows: rows[1:])
    forge(run)
    assert broken(run) == ["summary"]

    from cai_export.policy import export_policy

    for name, product in (("after", run.adapter), ("before", None)):
        rules = constitutions.load(german)
        export_policy(str(tiny_model), product, tmp_path / name, ("fp32",), rules)
    bundles = ["--bundle", str(tmp_path / "after"), "--against", str(tmp_path / "before")]
    output = ["--prompts", str(few_prompts), "--output", str(tmp_path / "compared")]
    assert main(["evaluate", *bundles, *output]) == 0
    again = read_json(tmp_path / "compared" / "summary.json")
    assert list(again["delta"]["principles"]) == list(WEIGHTS)
    assert again["critic"] == "lexicon"
    assert again["drift"]["after"]["words"] == summary["drift"]["after"]["words"]


def test_a_judge_that_compares_for_the_training_gives_numbers_to_evaluate(
    job: list[str], tiny_constitution: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    flags = [*job, "--critic", "judge", "--judge_mode", "pairwise", "--evaluator", "judge"]
    with Server().thread() as url:
        given = [*flags, "--judge_url", url, "--output", str(run.path)]
        result = run_python("-m", "cai_scale.launch.train", *given)
    assert result.returncode == 0, result.stderr[-3000:]
    assert read_json(run.summary)["critic"] == "judge"
    rows = [row for _, row in read_jsonl(run.evaluation("scores"))]
    names = [principle.id for principle in constitutions.load(tiny_constitution).principles]
    for row in rows:
        read = html.unescape(fenced(row["response"]))
        expected = {name: quality_of(read, name) for name in names}
        assert row["score"]["principles"] == pytest.approx(expected)
    assert broken(run) == []
