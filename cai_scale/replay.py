"""A run's results, worked out again from its stored answers, and compared. No torch."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cai_scale import config as settings
from cai_scale import constitution, labels, results
from cai_scale import prompts as prompt_files
from cai_scale.chain import of_round, stages
from cai_scale.constitution import Constitution
from cai_scale.critics import LEXICONS, Critic, load_critic
from cai_scale.errors import CaiError, GateError
from cai_scale.evaluation import measures
from cai_scale.preferences.pairs import read_pairs
from cai_scale.ranks import Ranks
from cai_scale.records import (
    Answer,
    Completion,
    Preference,
    Prompt,
    Response,
    Score,
    read_json,
    read_records,
)
from cai_scale.rollout.sampler import Request
from cai_scale.runs import Run
from cai_scale.training import references

# Means are stored to six decimals; another processor may round the last one differently.
TOLERANCE = 1.5e-6


class Replay:
    """Works through a run's stored answers by the code that wrote its results.

    Each of `checks`, by the name of its stage, says what was found to follow from the answers.
    It raises a `CaiError` where something does not; files that were not as they were written
    may make it raise any other error too.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    @property
    def checks(self) -> dict[str, Callable[[], str]]:
        """The checks of the stages that this run has."""
        by_stage = {
            "start": self.start,
            "evaluate": self.rewards,
            "measure": self.measures,
            "summary": self.summary,
        }
        for when in measures.WHEN:
            by_stage[f"evaluate {when}"] = functools.partial(self.evaluation, when)
        for number in range(1, self.run.rounds + 1):
            for name, check in (
                ("rollout", self.rollout),
                ("revise", self.revise),
                ("pair", self.pair),
            ):
                by_stage[of_round(name, number)] = functools.partial(check, number)
            if self.run.round(number).references.is_file():
                by_stage[of_round("train", number)] = functools.partial(self.references, number)
        return {name: check for name, check in by_stage.items() if name in stages(self.run)}

    @functools.cached_property
    def config(self) -> settings.Config:
        return settings.from_dict(self.run.settings(), str(self.run.config))

    @functools.cached_property
    def constitution(self) -> Constitution:
        return constitution.from_dict(read_json(self.run.constitution), "constitution.json")

    @functools.cached_property
    def evaluator(self) -> Critic:
        return results.evaluator(self.config, self.run, self.constitution, Stored())

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        return prompt_files.load(str(self.run.prompts("train")))

    @functools.cached_property
    def heldout(self) -> list[Prompt]:
        return prompt_files.load(str(self.run.prompts("heldout")))

    def rollouts(self, number: int) -> list[Response]:
        files = self.run.round(number)
        _require(files.rollouts)
        return results.rollouts(self.config, self.prompts, files, Stored(), Ranks(), round=number)

    def revised(self, number: int) -> tuple[list[Response], list[Score | None]]:
        files = self.run.round(number)
        products = [files.revisions(n) for n in range(1, self.config.revisions + 1)]
        for product in (files.rollouts, *products):
            _require(product)
            if not self.config.labels_pairs:
                _require(files.scores(product))
        return labels.answers(
            self.config,
            self.constitution,
            Stored(),
            Stored() if self.config.labels_pairs else None,
            self.prompts,
            self.rollouts(number),
            files,
            Stored(),
            Ranks(),
        )

    def answers(self, when: str) -> list[Response]:
        _require(self.run.evaluation(when))
        return results.heldout(self.heldout, self.run, when, Stored(), Ranks())

    @functools.cached_property
    def measured(self) -> results.Measures:
        file = self.run.evaluation("measures")
        _require(file)
        return measures.read(file, self.heldout)

    def start(self) -> str:
        record = self.run.record
        if self.constitution.sha256 != record["constitution"]["sha256"]:
            raise GateError("constitution.json is not the one that config.json names")
        found = []
        for kind, asked, source in (
            ("train", self.prompts, self.config.prompts),
            ("heldout", self.heldout, self.config.eval_prompts),
        ):
            if prompt_files.digest(asked) != record["prompts"][kind]:
                raise GateError(f"prompts/{kind}.jsonl are not those that config.json names")
            found.append(f"{kind} prompts {_source(source, record['prompts'][kind])}")
        return ", ".join(found)

    def evaluation(self, when: str) -> str:
        return f"{len(self.answers(when))} answers, as they were asked for"

    def measures(self) -> str:
        """They are of the answers; the numbers themselves need the models."""
        return f"measures of {sum(map(len, self.measured.values()))} answers"

    def rollout(self, number: int) -> str:
        return f"{len(self.rollouts(number))} answers, as they were asked for"

    def revise(self, number: int) -> str:
        responses, _ = self.revised(number)
        kept = sum(response.revised for response in responses)
        files = self.run.round(number)
        scored = [self._scored_again(f) for f in (files.rollouts, *files.all_revisions())]
        return f"asked for by the rules, {kept} better than their samples; {scored[0]}"

    def pair(self, number: int) -> str:
        files = self.run.round(number)
        _require(files.refused)
        responses, scores = self.revised(number)
        compared = None
        if self.config.labels_pairs and self.config.pairs == "answers":
            _require(files.comparisons(files.pairs))
            compared = labels.comparisons(
                self.config, self.constitution, Stored(), self.prompts, responses, files, Ranks()
            )
        pairs, figures, refused = labels.pairs(
            self.config, self.prompts, files, responses, scores, compared
        )
        stored = read_pairs(files.pairs)
        if [p.prompt_id for p in pairs] != [p.prompt_id for p in stored]:
            raise GateError(
                f"pairs.jsonl has {len(stored)} pairs, and the stored answers give {len(pairs)} of "
                f"these or other prompts"
            )
        for pair, other in zip(pairs, stored, strict=True):
            if pair != other:
                raise GateError(
                    f"the pair of prompt {pair.prompt_id} is not what the stored answers give"
                )
        rows = read_records(files.refused, dict)
        if len(rows) != len(refused):
            raise GateError(
                f"refused.jsonl has {len(rows)} rows, and the stored answers give {len(refused)}"
            )
        _same(rows, refused, "refused.jsonl")
        _same(read_json(files.audit), figures, "audit.json")
        return (
            f"{len(pairs)} pairs, {len(refused)} refusals and the audit, rebuilt from the answers"
        )

    def references(self, number: int) -> str:
        """They are of the pairs and of the base model; the numbers themselves need that model."""
        files, record = self.run.round(number), self.run.record
        key, found = references.content(files.references)
        ours = {"max_length": self.config.max_length, "qlora": self.config.qlora}
        ours |= {"weights": record["weights"], "precision": record["precision"]["name"]}
        _same({name: key.get(name) for name in ours}, ours, "references.json: key")
        stored = iter(p.prompt_id for p in read_pairs(files.pairs))
        if not all(reference.prompt_id in stored for reference in found):  # in the same order
            raise GateError("references.json is of other pairs than pairs.jsonl has")
        return f"references of {len(found)} pairs by the base model that config.json names"

    @functools.cached_property
    def rewarded(self) -> list[Answer]:
        product = self.run.evaluation("rewards")
        file = self.run.round(1).scores(product)
        for path in (product, file, self.run.evaluation("predicted")):
            _require(path)
        responses = results.reward_answers(self.config, self.heldout, self.run, Stored(), Ranks())
        asked = [""] * len(responses)
        scores = labels.score_once(Stored(), asked, responses, file, Ranks())
        return labels.scored(self.heldout, responses, scores)

    def rewards(self) -> str:
        said = f"{len(self.rewarded)} answers, as they were asked for"
        return f"{said}; {self._scored_again(self.run.evaluation('rewards'))}"

    def summary(self) -> str:
        if self.config.method == "reward":
            again = results.reward_summary(self.config, self.run, self.constitution, self.rewarded)
            _same(read_json(self.run.summary), again, "summary.json")
            return f"figures over {again['reward']['n']} answers recomputed"
        answered = results.answered(
            self.evaluator,
            self.heldout,
            self.answers("before"),
            self.answers("after"),
            self.measured,
        )
        again = results.summary(self.config, self.run, self.constitution, self.evaluator, answered)
        _same(read_json(self.run.summary), again, "summary.json")
        scored = "scored again" if self.config.evaluator == "lexicon" else "as scored"
        return f"answers to {again['n']} prompts {scored}, table and interval recomputed"

    def _scored_again(self, product: Path) -> str:
        """The stored scores of stored answers are what the lexicon gives; it alone is at hand."""
        if self.config.labels_pairs:
            return "the judge compares pairs"
        if self.config.critic not in LEXICONS:
            return f"scores as {self.config.critic} gave them"
        text = {prompt.id: prompt.text for prompt in (*self.prompts, *self.heldout)}
        responses = read_records(product, lambda record: Response(**record))
        again = load_critic(self.config.critic, self.constitution).score(
            [text[r.prompt_id] for r in responses], [r.text for r in responses]
        )
        file = self.run.round(1).scores(product)
        stored = read_records(file, lambda row: row["score"])
        for score, other, response in zip(again, stored, responses, strict=True):
            _same(other, score and score.plain(), f"{file.name}: {response.prompt_id}")
        return "scored again"


class Stored:
    """Stands where a sampler or a critic does when every answer has its score already."""

    name = "stored"

    def prompt_tokens(self, request: Request) -> int:
        raise GateError(f"the answer to {request.prompt_id} is not stored")

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        raise GateError("the score of an answer is not stored")

    def compare(
        self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]
    ) -> list[Preference]:
        raise GateError("the verdict on two answers is not stored")

    def why(self, prompt: str, response: str) -> str:
        raise GateError("why an answer has no score is not stored")

    def sample(self, batches: Sequence[Sequence[Request]]) -> Iterator[tuple[Request, Completion]]:
        raise GateError(f"the answer to {batches[0][0].prompt_id} is not stored")


def _source(name: str, digest: str) -> str:
    """Whether the prompts' source, which may have moved since, is as it was."""
    bundled = name in (prompt_files.TRAIN, prompt_files.HELDOUT)
    if not bundled and not Path(name).is_file():
        return "as kept (their source is not at hand)"
    try:
        same = prompt_files.digest(prompt_files.load(name)) == digest
    except CaiError:
        same = False
    return "as in their source" if same else f"as kept (their source {name} has changed since)"


def _same(stored: object, again: object, where: str) -> None:
    """Complain about the first place where two JSON values differ."""
    if isinstance(stored, dict) and isinstance(again, dict):
        for key in {**again, **stored}:
            if key not in stored or key not in again:
                raise GateError(f"{where} {'lacks' if key in again else 'has an unknown'} {key!r}")
            _same(stored[key], again[key], f"{where}: {key}")
    elif isinstance(stored, list) and isinstance(again, list) and len(stored) == len(again):
        for one, other in zip(stored, again, strict=True):
            _same(one, other, where)
    elif isinstance(stored, float) and isinstance(again, float):
        if not abs(stored - again) <= TOLERANCE:
            raise GateError(f"{where} is {stored}, and {again} when recomputed")
    elif stored != again:
        raise GateError(f"{where} is {stored!r}, and {again!r} when recomputed")


def _require(file: Path) -> None:
    if not file.is_file():
        raise GateError(f"{file.name} is missing")
