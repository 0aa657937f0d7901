"""`cai-scale trace`: one prompt's way through a run, for people to read. No torch."""

import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cai_scale import config as settings
from cai_scale import constitution as constitutions
from cai_scale import prompts as prompt_files
from cai_scale import results, runs
from cai_scale.commands import Parser
from cai_scale.critics import Critic
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.errors import ConfigError, GateError, MissingError
from cai_scale.preferences.pairs import read_pairs
from cai_scale.records import Prompt, Response, Score, read_json, read_records
from cai_scale.replay import Stored
from cai_scale.rollout.revise import better, sample_of
from cai_scale.runs import Round, Run
from cai_scale.terminal import coloured, wrapped

NEAREST = 5  # ids to offer in place of an unknown one


def main(arguments: Sequence[str]) -> int:
    """`cai-scale trace PROMPT_ID`."""
    parser = Parser(
        prog="cai-scale trace",
        description="Show one prompt's way through a run: its samples and revisions with their "
        "scores and the words that moved them, its pair, and its answers before and after.",
        allow_abbrev=False,
    )
    parser.add_argument("prompt_id", metavar="PROMPT_ID", help="the id of a prompt of the run")
    parser.add_argument("--run", type=Path, help="a run's folder (default: the newest finished)")
    parser.add_argument(
        "--round", type=int, default=1, help="of a run with several rounds (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    run = Run(options.run) if options.run else runs.newest(runs.ROOT, finished=True)
    if not run.config.is_file():
        raise MissingError(f"{run.path} holds no run; name the folder of one with --run")
    if not 1 <= options.round <= run.rounds:
        raise ConfigError(f"--round {options.round}: {run.path} has rounds 1 to {run.rounds}")
    found = trace(run, options.prompt_id, options.round)
    print(json.dumps(found, ensure_ascii=False, indent=2) if options.json else as_text(found))
    return 0


def trace(run: Run, prompt_id: str, number: int = 1) -> dict[str, Any]:
    """All that a run did with a prompt, as far as it has come.

    Returns:
        `prompt`; `samples`, each with its `revisions`, and `pairs` (or why there are none) where
        it is a training prompt; `before`, `after` and `verdict` where it is held out. Answers
        have their scores, and the terms that moved these with the effect of all occurrences.

    Raises:
        MissingError: no prompt of the run has that id; the nearest are named.
    """
    train, heldout = ({p.id: p for p in _prompts(run, kind)} for kind in ("train", "heldout"))
    if prompt_id not in {*train, *heldout}:
        ids = list({**train, **heldout})
        nearest = difflib.get_close_matches(prompt_id, ids, NEAREST, cutoff=0.4) or ids[:NEAREST]
        raise MissingError(
            f"{run.path} has no prompt {prompt_id!r}; the nearest ids: {', '.join(nearest)}"
        )
    constitution = constitutions.from_dict(read_json(run.constitution), str(run.constitution))
    critic = LexiconCritic(constitution)
    found: dict[str, Any] = {"run": str(run.path)}
    found["prompt"] = asdict(train.get(prompt_id) or heldout[prompt_id])
    if prompt_id in train:
        found |= _training(run, train[prompt_id], critic, number)
    if prompt_id in heldout:
        found |= _evaluation(run, heldout[prompt_id], critic)
    return found


def as_text(found: dict[str, Any]) -> str:
    """What `trace` found, in lines for a terminal."""
    prompt = found["prompt"]
    about = ", ".join(filter(None, (prompt["language"], prompt["category"], found["run"])))
    lines = [f"{coloured(prompt['id'], 'bold')}  ({about})"]
    for message in prompt["messages"]:
        lines.append(wrapped(message["content"], f"  {message['role']}: ", "    "))
    if "samples" in found:
        lines += ["", coloured(f"samples: {len(found['samples'])}", "bold")]
        for sample in found["samples"]:
            lines += _answer(f"{sample['sample']}", sample)
            for revision in sample["revisions"]:
                verdict = "kept" if revision["better"] else "not better"
                lines += _answer(f"{sample['sample']}, revised, {verdict}", revision)
    if "unpaired" in found:
        lines += ["", coloured(f"no pair: {found['unpaired']}", "bold")]
    for pair in found.get("pairs", ()):
        lines += ["", coloured(f"pair: gap {pair['gap']:.4f}", "bold")]
        for role in ("chosen", "rejected"):
            revised = ", revised" if pair[role]["revised"] else ""
            lines += _answer(role + revised, pair[role])
    if "before" in found:
        verdict = f": {found['verdict']}" if "verdict" in found else ""
        lines += ["", coloured(f"held out{verdict}", "bold")]
        for when in ("before", "after"):
            if when in found:
                lines += _answer(when, found[when])
    return "\n".join(lines)


def _training(run: Run, prompt: Prompt, critic: LexiconCritic, number: int) -> dict[str, Any]:
    files = run.round(number)
    given = list(_with_scores(files, files.rollouts, prompt.id))
    samples = {r.sample: {**_shown(r, score, critic), "revisions": []} for r, score in given}
    best = {response.sample: (response, score) for response, score in given}
    for file in files.all_revisions():
        for revision, score in _with_scores(files, file, prompt.id):
            sample = sample_of(revision.sample)
            wins = better(score, best[sample][1])
            if wins:
                best[sample] = (revision, score)
            samples[sample]["revisions"].append({**_shown(revision, score, critic), "better": wins})
    found: dict[str, Any] = {"samples": list(samples.values())}
    if files.pairs.is_file():
        found["pairs"] = [
            {
                "chosen": asdict(pair.chosen),
                "rejected": asdict(pair.rejected),
                "gap": round(pair.chosen.score - pair.rejected.score, 9),
            }
            for pair in read_pairs(files.pairs)
            if pair.prompt_id == prompt.id
        ]
        if not found["pairs"]:
            found["unpaired"] = _unpaired(files, prompt.id)
    return found


def _unpaired(files: Round, prompt_id: str) -> str:
    """Why a prompt has no pair: what its row says, which comes after those of its answers."""
    refused = read_records(files.refused, dict) if files.refused.is_file() else []
    kinds = [row["refused"] for row in refused if row["prompt_id"] == prompt_id]
    return str(kinds[-1]).replace("_", " ") if kinds else "not recorded"


def _evaluation(run: Run, prompt: Prompt, critic: LexiconCritic) -> dict[str, Any]:
    given = {
        when: answer
        for when in ("before", "after")
        for answer in _answers(run.evaluation(when), prompt.id)
    }
    config = settings.from_dict(run.settings(), str(run.config))
    evaluator = results.evaluator(config, run, critic.constitution, Stored())
    found: dict[str, Any] = {
        when: _shown(answer, _evaluated(evaluator, prompt, answer), critic)
        for when, answer in given.items()
    }
    with suppress(KeyError, GateError):  # not answered, or not scored, so far
        before, after = ([given[when]] for when in ("before", "after"))
        (answered,) = results.answered(evaluator, [prompt], before, after)
        found["verdict"] = answered.verdict
    return found


def _evaluated(evaluator: Critic, prompt: Prompt, answer: Response) -> Score | None:
    """The score of a held-out answer; None too where a critic has not been asked so far."""
    with suppress(GateError):
        return evaluator.score([prompt.text], [answer.text])[0]
    return None


def _prompts(run: Run, kind: str) -> list[Prompt]:
    """The run's own copy; the source for runs that were made before they kept one."""
    if run.prompts(kind).is_file():
        return prompt_files.load(str(run.prompts(kind)))
    return prompt_files.load(run.settings()["prompts" if kind == "train" else "eval_prompts"])


def _answers(file: Path, prompt_id: str) -> list[Response]:
    if not file.is_file():
        return []
    answers = read_records(file, lambda record: Response(**record))
    return [answer for answer in answers if answer.prompt_id == prompt_id]


def _with_scores(
    files: Round, product: Path, prompt_id: str
) -> Iterator[tuple[Response, Score | None]]:
    """The answers to a prompt in a file, with the scores that the critic gave them."""
    answers, scores = _answers(product, prompt_id), files.scores(product)
    rows = read_records(scores, dict) if scores.is_file() else []
    given = {row["sample"]: row["score"] for row in rows if row["prompt_id"] == prompt_id}
    for answer in answers:
        score = given.get(answer.sample)
        yield answer, score and Score(**score)


def _shown(answer: Response, score: Score | None, critic: LexiconCritic) -> dict[str, Any]:
    """An answer with its score, and the lexicon's words in it."""
    effects = {
        (p.id, i.id): i.effect for p in critic.constitution.principles for i in p.lexicon.lists
    }
    return {
        **asdict(answer),
        "score": score and score.plain(),
        "words": [
            {
                "term": term,
                "principle": principle,
                "list": name,
                "count": count,
                "effect": round(count * effects[principle, name], 9),
            }
            for (principle, name, term), count in sorted(critic.occurrences(answer.text).items())
        ],
    }


def _answer(title: str, answer: dict[str, Any]) -> list[str]:
    score = answer["score"]
    if isinstance(score, dict):
        parts = [f"{key} {value:.2f}" for key, value in score["principles"].items()]
        shown = f"{score['overall']:.4f} ({', '.join(parts)})"
    else:
        none = "no score" if answer["text"].strip() else "no score: empty"
        shown = none if score is None else f"{score:.4f}"
    title = f"{title}  T {answer['temperature']:g}  {shown}"
    lines = [wrapped(title, "  ", "      "), wrapped(answer["text"], "    ")]
    if answer.get("words"):
        words = (f"{w['term']} {w['effect']:+g} {w['principle']}" for w in answer["words"])
        lines.append(coloured(wrapped("; ".join(words), "    moved by: ", "      "), "dim"))
    return lines
