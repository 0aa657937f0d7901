"""The main job with a judge, from nothing to a bundle; and real models as judges."""

import contextlib
import html
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import httpx2
import pytest

from cai_scale import constitution as constitutions
from cai_scale import prompts
from cai_scale.critics import DISAGREE
from cai_scale.critics import judge as judges
from cai_scale.critics.judge import Judge, Settings, remote
from cai_scale.critics.judge.questions import fenced
from cai_scale.preferences.pairs import read_pairs
from cai_scale.records import read_json, read_jsonl
from cai_scale.runs import Run
from cai_scale.verify import verify_run
from judge_server import Judge as Server
from judging import quality_of
from processes import free_port, run_deepspeed, run_python, serving

pytestmark = pytest.mark.slow

DEFAULT = "smollm2-135m-q4"


def quality(text: str, principle: str) -> float:
    """What the scripted judge thinks of a text, as it reads it."""
    return quality_of(html.unescape(fenced(text)), principle)


def broken(run: Run) -> dict[str, str]:
    return {link.name: link.said for link in verify_run(run) if link.ok is False}


@pytest.fixture(scope="module")
def ids(tiny_constitution: Path) -> list[str]:
    return [p.id for p in constitutions.load(tiny_constitution).principles]


def test_from_nothing_to_a_bundle_by_a_judge_that_scores(
    job: list[str], ids: list[str], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    with Server(faults=0.2, kinds=["429_seconds", "500", "prose"]).thread() as url:
        flags = [*job, "--method", "dpo", "--critic", "judge", "--judge_url", url]
        flags += ["--ds_config", "zero2.json", "--output", str(run.path)]
        result = run_deepspeed(2, "launch/train.py", *flags)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    files = run.round(1)
    texts = {(r["prompt_id"], r["sample"]): r["text"] for _, r in read_jsonl(files.rollouts)}
    rows = [row for _, row in read_jsonl(files.scores(files.rollouts))]
    assert len(rows) == len(texts) == 80
    for row in rows:
        text = texts[row["prompt_id"], row["sample"]]
        expected = {name: quality(text, name) for name in ids}
        assert row["score"]["principles"] == pytest.approx(expected)
        assert row["score"]["overall"] == pytest.approx(mean(expected.values()))
    assert read_json(run.summary)["trained_on"] == "judge"
    assert run.labels().is_file() and not list(run.path.glob("labels*-*"))
    assert broken(run) == {}
    bundle = run_python("-m", "cai_export.cli", "--merge-lora", "--run", str(run.path))
    assert bundle.returncode == 0, bundle.stderr[-2000:]
    score = ["--bundle", str(run.bundle), "--prompt", "p", "--response", "r"]
    assert run_python("-m", "cai_scale.cli", "score", *score).returncode == 0


@pytest.mark.parametrize(("mode", "of"), [("pairwise", "answers"), ("logprob", "revisions")])
def test_a_judge_that_compares_labels_the_pairs(
    mode: str, of: str, job: list[str], ids: list[str], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    flags = [*job, "--critic", "judge", "--judge_mode", mode, "--judge_principles", "one"]
    flags += ["--pairs", of, "--revision", "critique", "--output", str(run.path)]
    with Server(latency=0.05).thread() as url:
        command = [sys.executable, "-m", "cai_scale.launch.train", *flags, "--judge_url", url]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        journal = run.labels()
        while process.poll() is None and not journal.exists():
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)  # while it judges
        process.wait()
    assert not run.finished
    with Server().thread() as url:  # it has moved
        resumed = ["--resume", "--output", str(run.path), "--judge_url", url]
        result = run_python("-m", "cai_scale.launch.train", *resumed)
    assert result.returncode == 0, result.stderr[-3000:]
    files = run.round(1)
    pairs = read_pairs(files.pairs)
    assert len(pairs) >= 8  # of 10 prompts
    for pair in pairs:
        assert set(pair.chosen.principles) <= set(ids)
        [name] = pair.chosen.principles
        by = name if mode == "pairwise" else None
        better, worse = (
            quality_of(html.unescape(fenced(one.text)), by) for one in (pair.chosen, pair.rejected)
        )
        assert better > worse
        assert of == "answers" or pair.chosen.revised != pair.rejected.revised
    refused = [row for _, row in read_jsonl(files.refused)]
    account = read_json(files.audit)
    assert sum(account["dropped"].values()) + sum(account["unpaired"].values()) == len(refused)
    assert files.critiques(files.revisions()).is_file()
    assert broken(run) == {}
    # The control: a verdict that is turned round is found.
    file = files.comparisons(files.pairs if of == "answers" else files.revisions())
    text = file.read_text()
    index = text.index('"lean": ') + len('"lean": ')
    file.write_text(text[:index] + '-0.123, "was": ' + text[index:])
    assert {"answers": "pair", "revisions": "revise"}[of] in broken(run)


@contextlib.contextmanager
def transformers_serving(folder: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    # It lists what the hub's cache holds, and fails where there is none.
    (folder / "cache").mkdir()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_CACHE": str(folder / "cache")},
    )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(f"{url}/models").status_code == 200:
                    break
            time.sleep(0.5)
        yield url
    finally:
        process.kill()
        process.wait()


def fifty() -> tuple[list[str], list[str], list[str]]:
    """Prompts of the bundled set, an answer of substance, and one that says nothing."""
    asked = [prompt.text for prompt in prompts.load("train") if prompt.language == "en"][:50]
    good = [f"Here is how to go about it, step by step, as you asked: {text}" for text in asked]
    return asked, good, ["No."] * 50


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model as a bundle, without the gate of an export."""
    from cai_export.policy import export_policy

    folder = tmp_path_factory.mktemp("policy") / "bundle"
    export_policy(DEFAULT, None, folder, ("fp32",), constitutions.load())
    return folder


def settings(url: str | None, **more: Any) -> Settings:
    return Settings(url=url, principles="one", reply_tokens=24, concurrency=8, **more)


def letters(judge: Judge, columns: Sequence[Sequence[str]]) -> list[float]:
    """P(A) of every question about these answers, in both orders."""
    asked = (
        subject
        for two in zip(*columns, strict=True)
        for both in judge._orders(*two)
        for subject, _ in both
    )
    verdicts = [judge.journal.get(subject) for subject in asked]
    return [value for verdict in verdicts for value in verdict.values.values()]  # type: ignore[union-attr]


def test_the_default_model_labels_behind_this_projects_server(served: Path, tmp_path: Path) -> None:
    """Its soft labels are those of the same model in torch, in this process. So small a model goes
    by the place: most of its labels are ties, and swapped answers swap whatever it says."""
    rules, given = constitutions.load(), fifty()
    command = ["-m", "cai_scale.cli", "serve", "--bundle", str(served), "--port", "0"]
    with serving(*command, timeout=400) as (address, _):
        asked = judges.load(
            rules, settings(f"{address}/v1", mode="logprob"), journal=tmp_path / "a", shown=False
        )
        found = asked.compare(*given)
        again = asked.compare(given[0], given[2], given[1])
    assert asked.spent["calls"] == len(asked.journal) == 100
    assert [p.lean for p in again] == [-(p.lean or 0.0) for p in found]
    assert all(p.lean or p.why == DISAGREE for p in found)
    local = judges.load(rules, settings(None, model=DEFAULT, mode="logprob"), shown=False)
    few = [column[:6] for column in given]
    local.compare(*few)
    expected = letters(local, few)
    assert letters(asked, few) == pytest.approx(expected, abs=1e-3)
    assert max(expected) - min(expected) > 0.02  # the control: other questions, other numbers


def test_the_default_model_labels_behind_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So small a model writes A, whatever it is shown: both orders say so, and that is a tie. What
    begins otherwise is an abstention with its reason."""
    import torch

    from cai_scale.training import models

    monkeypatch.setattr(remote, "REPLIES", 1)
    folder = tmp_path / "model"
    models.load_model(DEFAULT, torch.bfloat16).save_pretrained(folder)
    models.load_tokenizer(DEFAULT).save_pretrained(folder)
    with transformers_serving(folder) as url:
        given = settings(url, model=str(folder), mode="letter")
        judges.check(given)
        asked = judges.load(constitutions.load(), given, journal=tmp_path / "b", shown=False)
        found = asked.compare(*fifty())
    assert len(found) == 50 and len(asked.journal) == 100
    for preference in found:
        assert (preference.lean is None) == preference.why.startswith("no valid reply")
    assert sum(preference.lean is not None for preference in found) >= 25
    print(Counter(preference.why for preference in found))
