"""A judge in this process, by transformers: no server, one batch of questions after another."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

from cai_scale.critics import INVALID
from cai_scale.critics.judge import verdict
from cai_scale.critics.judge.budget import Budget
from cai_scale.critics.judge.journal import NOTHING, Spent, Subject, Verdict
from cai_scale.critics.judge.questions import Question, fenced
from cai_scale.errors import DataError
from cai_scale.records import Message
from cai_scale.rollout.sampler import Request, TransformersSampler
from cai_scale.training import models

REPLIES = 2  # to one question that are no verdict, before there is none
RETRY_TEMPERATURE = 0.7

Asked = tuple[Subject, Question]


class LocalModel:
    """A model by its path or name, loaded at the first question."""

    def __init__(self, name: str, *, rows: int, tokens: int) -> None:
        """
        Args:
            rows: how many questions it reads at once.
            tokens: the longest reply.
        """
        self.name, self.rows, self.tokens = name, rows, tokens

    def ask(
        self,
        questions: Iterable[Asked],
        settle: Callable[[Subject, Verdict], None],
        budget: Budget,
    ) -> None:
        """Ask all questions; raises `BudgetError`: see `Budget`."""
        waiting = iter(questions)
        while batch := list(itertools.islice(waiting, self.rows)):
            for subject, found in self._batch(batch, budget):
                settle(subject, found)

    def _batch(self, batch: Sequence[Asked], budget: Budget) -> list[tuple[Subject, Verdict]]:
        settled: list[tuple[Subject, Verdict]] = []
        spent = [NOTHING] * len(batch)
        left = list(range(len(batch)))
        for tries in range(REPLIES):
            budget.check()
            again = []
            for index, (taken, reply) in zip(
                left, self._replies([batch[i] for i in left], tries), strict=True
            ):
                budget.add(taken)
                spent[index] += taken
                subject, question = batch[index]
                try:
                    settled.append((subject, Verdict(_read(question, reply), "", spent[index])))
                except DataError as error:
                    # The letter of the same question is the same again.
                    last = question.schema is None and question.settle is None
                    if tries + 1 < REPLIES and not last:
                        again.append(index)
                    else:
                        why = f"{INVALID} ({error})"
                        settled.append((subject, Verdict(None, why, spent[index])))
            left = again
            if not left:
                break
        return settled

    def _replies(self, asked: Sequence[Asked], tries: int) -> list[tuple[Spent, Any]]:
        """What each took, and its text; the log-probabilities of its first token for a letter."""
        texts = self._texts([a for a in asked if a[1].schema or a[1].settle], tries)
        found = []
        for subject, question in asked:
            spent, text = texts.get(subject.key, (NOTHING, ""))
            reply: Any = text
            if question.schema is None:
                messages = list(question.messages)
                if question.settle is not None:
                    messages.append({"role": "assistant", "content": fenced(text)})
                    messages.append({"role": "user", "content": question.settle})
                count, reply = self._first_token(messages)
                spent += Spent(1, count, 1)
            found.append((spent, reply))
        return found

    def _texts(self, asked: Sequence[Asked], tries: int) -> dict[str, tuple[Spent, str]]:
        requests = [
            Request(
                messages=question.messages,
                prompt_id=subject.key,
                sample=tries,
                temperature=RETRY_TEMPERATURE if tries else 0.0,
            )
            for subject, question in asked
        ]
        # A new one each time: it remembers the tokens of every prompt.
        sampler = TransformersSampler(
            lambda: self._model, self._tokenizer, max_new_tokens=self.tokens, top_p=0.95, top_k=50
        )
        return {
            request.prompt_id: (
                Spent(1, sampler.prompt_tokens(request), completion.tokens),
                completion.text,
            )
            for request, completion in sampler.sample([requests] if requests else [])
        }

    def _first_token(self, messages: Sequence[Message]) -> tuple[int, list[tuple[str, float]]]:
        """The length of a conversation, and the log-probabilities of what may come next."""
        import torch

        encoded = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(self._model.device)
        with torch.inference_mode():
            logits = self._model(**encoded).logits[0, -1].float().log_softmax(-1)
        values, tokens = logits.topk(20)
        names = self._tokenizer.convert_ids_to_tokens(tokens.tolist())
        texts = [self._tokenizer.convert_tokens_to_string([name]) for name in names]
        return encoded["input_ids"].shape[1], list(zip(texts, values.tolist(), strict=True))

    @cached_property
    def _tokenizer(self) -> Any:
        return models.load_tokenizer(self.name)

    @cached_property
    def _model(self) -> Any:
        import torch

        dtype = torch.float32 if models.device().type == "cpu" else torch.bfloat16
        with models.whole():
            return models.load_trained(self.name, None, dtype)


def _read(question: Question, reply: Any) -> dict[str, float]:
    if question.kind == "choose":
        return {question.ids[0]: verdict.probability(reply)}
    if question.kind == "letter":
        return {question.ids[0]: verdict.letter(reply[0][0])}  # the likeliest
    return verdict.read(question, reply)
