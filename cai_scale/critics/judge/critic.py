"""Scores and preferences from a judge's verdicts, each asked for once and kept in a journal."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import cache, cached_property
from typing import Protocol

from cai_scale.constitution import Constitution, Principle
from cai_scale.critics import DISAGREE, EMPTY
from cai_scale.critics.judge import questions
from cai_scale.critics.judge.budget import Budget
from cai_scale.critics.judge.journal import Journal, Subject, Verdict, digest
from cai_scale.critics.judge.questions import Question, blank
from cai_scale.critics.judge.settings import Settings
from cai_scale.records import Preference, Score, canonical
from cai_scale.terminal import progress_bar

# Reasoning makes a model too sure of its letter: Bai et al. 2022 (arXiv 2212.08073, section 4.1)
# clamp its probability to this range.
THOUGHT_RANGE = (0.4, 0.6)

Text = tuple[str, str]  # a prompt and its response
Two = tuple[str, str, str]  # a prompt and two responses


class Model(Protocol):
    """What answers a judge's questions."""

    name: str

    def ask(
        self,
        questions: Iterable[tuple[Subject, Question]],
        settle: Callable[[Subject, Verdict], None],
        budget: Budget,
    ) -> None:
        """Call `settle` once for each question, as each gets its verdict, or will get none."""
        ...


class Judge:
    """A language model that is asked about answers, one at a time or two together.

    It is asked to score where `settings.mode` is "absolute", and else to compare.
    """

    def __init__(
        self,
        constitution: Constitution,
        settings: Settings,
        model: Model,
        journal: Journal,
        *,
        name: str = "judge",
        shown: bool = True,
    ) -> None:
        """
        Args:
            shown: whether to show a progress bar while questions are asked.
        """
        self.name = name
        self.constitution, self.settings, self.model = constitution, settings, model
        self.journal, self.shown = journal, shown
        self._template = cache(self._template_of)

    @cached_property
    def budget(self) -> Budget:
        return Budget(
            tokens=self.settings.max_tokens,
            money=self.settings.max_cost,
            prices=self.settings.prices,
            spent=self.journal.spent(self.model.name),
        )

    @property
    def _one_by_one(self) -> bool:
        """Whether each principle is a question of its own."""
        return self.settings.by_letter and self.settings.principles == "all"

    @property
    def spent(self) -> dict[str, float]:
        """Calls, tokens and, where prices are given, money; those of earlier starts too."""
        spent, money = self.budget.spent, self.budget.money
        return {
            "calls": spent.calls,
            "prompt_tokens": spent.tokens_in,
            "completion_tokens": spent.tokens_out,
            **({} if money is None else {"money": money}),
        }

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        """Each principle's number; the judge is asked once, all principles together.

        Raises:
            ServerError: the server cannot be asked.
            BudgetError: the budget is spent. In both cases the verdicts so far are kept.
        """
        given = list(zip(prompts, responses, strict=True))
        full = [one for one in given if not blank(one[1])]
        with closing(self.journal):
            self._settle((self._rating(*one) for one in full), len(full))
            return [self._score(*one) for one in given]

    def why(self, prompt: str, response: str) -> str:
        if blank(response):
            return EMPTY
        with closing(self.journal):
            found = self.journal.get(self._rating(prompt, response)[0])
        return found.why if found else "not judged"

    def compare(
        self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]
    ) -> list[Preference]:
        """Which is better, by both orders; raises as `score`."""
        given = list(zip(prompts, firsts, seconds, strict=True))
        each = len(self.constitution.principles) if self._one_by_one else 1
        asked = (question for two in given for both in self._orders(*two) for question in both)
        with closing(self.journal):
            self._settle(asked, 2 * each * len(given))
            return [self._preference(*two) for two in given]

    def _score(self, prompt: str, response: str) -> Score | None:
        if blank(response):
            return None
        found = self.journal.get(self._rating(prompt, response)[0])
        if found is None or found.values is None:
            return None
        values = {p.id: found.values[p.id] for p in self.constitution.principles}
        return Score(values, round(self.constitution.overall(values), 9))

    def _preference(self, prompt: str, first: str, second: str) -> Preference:
        if blank(first) or blank(second):
            return Preference(None, EMPTY)
        if first == second:
            return Preference(0.0, "the same answer")
        leans: dict[str, float] = {}
        disagree = False
        for one, other in self._orders(prompt, first, second):
            found = []
            for subject, _ in (one, other):
                verdict = self.journal.get(subject)
                if verdict is None or verdict.values is None:
                    return Preference(None, verdict.why if verdict else "not judged")
                found.append(verdict.values)
            ours, theirs = found
            for principle in one[1].ids:
                lean = self._lean(one[1].kind, ours[principle], theirs[principle])
                disagree = disagree or lean is None
                leans[principle] = lean or 0.0
        weights = {p.id: p.weight for p in self.constitution.principles if p.id in leans}
        lean = sum(weights[p] * leans[p] for p in weights) / sum(weights.values())
        return Preference(lean, "" if lean else DISAGREE if disagree else "tie", leans)

    def _lean(self, kind: str, ours: float, theirs: float) -> float | None:
        """From -1 to 1, above 0 for what stood first in the order of `ours`; None where the
        orders name different answers. To swap the orders changes the sign and nothing else."""
        if kind in ("compare", "letter"):
            return None if ours * theirs > 0 else ours if ours == -theirs else 0.0
        if self.settings.thinking:
            low, high = THOUGHT_RANGE
            ours, theirs = min(max(ours, low), high), min(max(theirs, low), high)
        return None if (ours - 0.5) * (theirs - 0.5) > 0 else ours - theirs

    def _rating(self, prompt: str, response: str) -> tuple[Subject, Question]:
        thinking = self.settings.thinking
        question = questions.rate(self.constitution, prompt, response, thinking=thinking)
        return self._subject(question, prompt, response), question

    def _orders(
        self, prompt: str, first: str, second: str
    ) -> Iterator[tuple[tuple[Subject, Question], tuple[Subject, Question]]]:
        """What is asked about two answers: in this order, and in the other."""
        if blank(first) or blank(second) or first == second:
            return
        chosen = self._principles(prompt, first, second)
        groups = [[p] for p in chosen] if self.settings.by_letter else [chosen]
        for group in groups:
            yield (
                self._comparison(group, prompt, first, second),
                self._comparison(group, prompt, second, first),
            )

    def _comparison(
        self, principles: Sequence[Principle], prompt: str, first: str, second: str
    ) -> tuple[Subject, Question]:
        thinking = self.settings.thinking
        if self.settings.by_letter:
            soft = self.settings.mode == "logprob"
            question = questions.choose(
                self.constitution,
                principles[0],
                prompt,
                first,
                second,
                soft=soft,
                thinking=thinking,
            )
        else:
            question = questions.compare(
                self.constitution, principles, prompt, first, second, thinking=thinking
            )
        return self._subject(question, prompt, first, second), question

    def _principles(self, prompt: str, first: str, second: str) -> Sequence[Principle]:
        """All of them, or one that the texts decide, whichever stands first."""
        principles = self.constitution.principles
        if self.settings.principles == "all":
            return principles
        texts = canonical([prompt, *sorted((first, second))])
        number = int.from_bytes(hashlib.sha256(texts.encode("utf-8", "surrogatepass")).digest()[:8])
        return [principles[number % len(principles)]]

    def _subject(self, question: Question, prompt: str, *answers: str) -> Subject:
        return Subject(
            constitution=self._constitution,
            judge=self.model.name,
            template=self._template(question.kind, question.ids),
            prompt=digest(prompt),
            answers=digest(canonical(answers)),
        )

    @cached_property
    def _constitution(self) -> str:
        return self.constitution.sha256

    def _template_of(self, kind: str, ids: tuple[str, ...]) -> str:
        """What a question says beside the texts; the ids tell one template from another."""
        principles = [p for p in self.constitution.principles if p.id in ids]
        thinking = self.settings.thinking
        if kind == "rate":
            question = questions.rate(self.constitution, "", "", thinking=thinking)
        elif kind == "compare":
            question = questions.compare(
                self.constitution, principles, "", "", "", thinking=thinking
            )
        else:
            question = questions.choose(
                self.constitution, principles[0], "", "", "", thinking=thinking
            )
        return digest(canonical([kind, question.messages, question.settle]))

    def _settle(self, asked: Iterable[tuple[Subject, Question]], total: int) -> None:
        """Have every question settled that the journal has no verdict on."""
        pending: set[str] = set()  # asked for, and not yet in the journal

        def new() -> Iterator[tuple[Subject, Question]]:
            for subject, question in asked:
                if subject.key in pending or self.journal.settled(subject):
                    bar.advance(task)
                else:
                    pending.add(subject.key)
                    yield subject, question

        def settle(subject: Subject, verdict: Verdict) -> None:
            self.journal.put(subject, verdict)
            pending.discard(subject.key)
            rate = self.budget.rate(bar.tasks[0].elapsed or 1e-9)
            bar.update(task, advance=1, rate=rate)

        unsettled = new()
        with progress_bar(self.shown) as bar:
            task = bar.add_task("judging", total=total, rate="")
            if (first := next(unsettled, None)) is not None:
                self.model.ask(itertools.chain([first], unsettled), settle, self.budget)
