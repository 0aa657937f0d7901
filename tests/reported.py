"""A run folder by hand, for tests of the report: no model has written it."""

import json
from pathlib import Path
from typing import Any

from cai_scale import constitution as constitutions
from cai_scale import results
from cai_scale.critics.judge.journal import Journal, Spent, Subject, Verdict
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.records import Prompt, Response, write_json, write_jsonl
from cai_scale.runs import Run

SCRIPT = "<script>document.title = 'broken'</script> & $x_$ {{ 7 * 7 }}"
NEW = ("length_matched", "supported", "halves", "words", "lengths", "safety", "gain")
REASONS = [f"Overall Δ +0.05. {SCRIPT}", "Not measured: perplexity."]
PAIRS = (  # before, after
    ("It could kill you.", f"Please consider this. {SCRIPT}"),
    ("No.", "For example, you might start by reading. Thank you."),
    ("Perhaps.", "It will always kill."),
    ("", "Please wait."),
    ("Please.", "Please."),
    ("You always win.", "You may win, for example here."),
    ("Có thể.", "Cảm ơn bạn, có lẽ là vậy."),
    ("A plain\x00 answer\x1b[1m.", "A plain answer, and some words more."),
    ("Perhaps, please.", "No."),
    ("Words and words.", "Please, consider words such as these."),
    ("w" * 300, "Perhaps " + "w" * 300),
    ("Maybe so.", "Certainly so."),
)
CATEGORIES = ("unsafe", "safe_looks_unsafe", "money")


def write_run(path: Path) -> tuple[Run, dict[str, Any]]:
    """A finished DPO run of two rounds with every part of a summary, and that summary."""
    run, constitution = Run(path), constitutions.load()
    prompts = [
        Prompt(
            id=f"p{i}",
            messages=({"role": "user", "content": f"question {i} {SCRIPT if i == 0 else ''}"},),
            language="vi" if i == 6 else "en",
            category=CATEGORIES[i % 3],
        )
        for i in range(len(PAIRS))
    ]
    answers = [
        [
            Response(
                prompt_id=f"p{i}", sample=0, round=0, temperature=0.7, text=pair[when],
                tokens=len(pair[when].split()), finished=True,
            )
            for i, pair in enumerate(PAIRS)
        ]
        for when in (0, 1)
    ]  # fmt: skip
    critic = LexiconCritic(constitution)
    answered = results.answered(critic, prompts, *answers)
    summary = {
        "schema": 1, "method": "dpo", "model": "tiny <model>", "constitution": constitution.sha256,
        "trained_on": "lexicon:half", "critic": "lexicon",
        **results.figures(constitution, critic, "lexicon:half", answered),
        "gain": {"verdict": "weak", "reasons": REASONS, "gaming": 0.3},
        "seconds": {"rollout": 1200.4, "train": 34.0}, "peak_memory_bytes": 3_210_000_000,
        "sampled_tokens": 123_456, "trained_parameters": 7_890,
    }  # fmt: skip
    write_json(run.summary, summary)
    write_json(run.constitution, dict(constitution.data))
    write_jsonl(run.prompts("heldout"), prompts)
    for when, responses in zip(("before", "after"), answers, strict=True):
        write_jsonl(run.evaluation(when), responses)
    settings = {"rounds": 2, "seed": 41, "ds_config": "zero2.json", "judge_prices": [2.0, 8.0]}
    write_json(run.config, {
        "schema": 1, "settings": settings, "constitution": {},
        "weights": {"w.safetensors": "a" * 64}, "prompts": {"train": "b" * 64},
        "precision": {"name": "fp32", "reason": "asked"},
        "ranks": {"world": 2}, "versions": {"torch": "9.9.9"}, "hardware": {"gpus": []},
    })  # fmt: skip
    write_json(run.round(2).audit, {"schema": 1, "pairs": 77, "chosen_longer": 0.5123})
    for number, scores in ((1, (0.5, 0.61)), (2, (0.7, 0.66))):
        logs = [
            {"step": 5 * i, "loss": 0.8 - i / 10, "rewards/margins": i / 10, "guard/score": score,
             "guard/kept": int(score != 0.66)}
            for i, score in enumerate(scores, 1)
        ]  # fmt: skip
        write_jsonl(run.trained(number).metrics, logs)
    journal = Journal(run.labels())
    spent = Spent(calls=3, tokens_in=1_000_000, tokens_out=250_000)
    journal.put(Subject("c", "j", "t", "p", "a"), Verdict(None, "why", spent))
    journal._file.close()
    return run, summary


def without_new(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary as runs wrote it before: no verdict, slices by language alone, little drift."""
    old = {key: value for key, value in summary.items() if key not in NEW and "ci95" not in key}
    drift = {
        when: {
            key: summary["drift"][when][key] for key in ("words", "distinct", "unfinished", "empty")
        }
        for when in ("before", "after")
    }
    return json.loads(json.dumps({**old, "drift": drift, "slices": summary["slices"]["language"]}))
