"""`cai-scale trace`: what it shows is what the files say."""

import json
from typing import Any

import pytest

from cai_scale import cli, constitution
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.errors import MissingError
from cai_scale.records import read_json, read_jsonl
from cai_scale.runs import Run
from cai_scale.terminal import wrapped
from cai_scale.trace import as_text, trace


@pytest.fixture(scope="module")
def critic(finished_run: Any) -> LexiconCritic:
    return LexiconCritic(constitution.from_dict(read_json(finished_run.constitution)))


def ids(run: Run) -> list[str]:
    return [record["id"] for _, record in read_jsonl(run.prompts("train"))]


def test_a_prompt_is_shown_as_the_files_have_it(finished_run: Any, critic: LexiconCritic) -> None:
    files = finished_run.round(1)
    pairs: dict[str, list[Any]] = {}
    for _, record in read_jsonl(files.pairs):
        pairs.setdefault(record["prompt_id"], []).append(record)
    revisions = [record for _, record in read_jsonl(files.revisions())]
    seen, moved = 0, 0
    for prompt_id in ids(finished_run):
        found = trace(finished_run, prompt_id)
        rows = [r for _, r in read_jsonl(files.rollouts) if r["prompt_id"] == prompt_id]
        assert [s["text"] for s in found["samples"]] == [r["text"] for r in rows]
        kept = {}
        for sample in found["samples"]:
            (score,) = critic.score([""], [sample["text"]])
            assert sample["score"] == (score and score.plain())
            moved += len(sample["words"])
            best = sample
            for revision in sample["revisions"]:
                seen += 1
                best = revision if revision["better"] else best
            kept[sample["sample"]] = best
        assert ("unpaired" in found) == (prompt_id not in pairs)
        if "unpaired" in found:
            assert found["unpaired"] in ("under margin", "fewer than two answers")
        for shown, pair in zip(found["pairs"], pairs.get(prompt_id, []), strict=True):
            gap = pair["chosen"]["score"] - pair["rejected"]["score"]
            assert shown["gap"] == pytest.approx(gap)
            for role in ("chosen", "rejected"):  # one of the answers that were kept
                assert pair[role]["text"] in [best["text"] for best in kept.values()]
    assert seen == len(revisions) > 0
    assert moved > 0
    assert any(p not in pairs for p in ids(finished_run)), "no prompt without a pair to show"


def test_words_add_up_to_the_score(finished_run: Any, critic: LexiconCritic) -> None:
    checked = 0
    for prompt_id in ids(finished_run):
        for sample in trace(finished_run, prompt_id)["samples"]:
            for principle in critic.constitution.principles if sample["score"] else ():
                moved = [w["effect"] for w in sample["words"] if w["principle"] == principle.id]
                expected = min(1.0, max(0.0, principle.lexicon.start + sum(moved)))
                assert sample["score"]["principles"][principle.id] == pytest.approx(expected)
                checked += bool(moved)
    assert checked > 0


def test_the_verdicts_are_those_of_the_summary(finished_run: Any) -> None:
    verdicts = [trace(finished_run, prompt_id)["verdict"] for prompt_id in ids(finished_run)]
    summary = read_json(finished_run.summary)
    assert {v: verdicts.count(v) for v in ("win", "loss", "tie")} == {
        v: summary[v] for v in ("win", "loss", "tie")
    }


def test_the_command_prints_text_or_json(
    finished_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt_id = ids(finished_run)[0]
    assert cli.main(["trace", prompt_id, "--run", str(finished_run.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(trace(finished_run, prompt_id)))
    assert cli.main(["trace", prompt_id, "--run", str(finished_run.path)]) == 0
    text = capsys.readouterr().out
    assert text == as_text(found) + "\n"
    for word in ("samples: 8", "T 0.7", "moved by:", "held out", "before", "after"):
        assert word in text
    assert "\x1b" not in text


def test_an_unknown_id_names_the_nearest(finished_run: Any, tmp_path: Any) -> None:
    known = ids(finished_run)[3]
    with pytest.raises(MissingError, match=rf"nearest ids: {known}"):
        trace(finished_run, known[:-1])
    with pytest.raises(MissingError, match=r"nearest ids: \d"):
        trace(finished_run, "zzz")
    assert cli.main(["trace", "x", "--run", str(tmp_path)]) == 2


def test_text_is_wrapped_and_harmless_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    lines = wrapped("one two " * 20 + "\n\x1b]0;title\x07end", "* ", "  ").splitlines()
    assert all(len(line) <= 50 for line in lines)
    assert lines[0].startswith("* one")
    assert lines[-1] == "   ]0;title end"
