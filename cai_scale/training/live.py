"""Answers from the weights under training: the ranks share the work, and meet through files.

A step's answers depend on the weights and on (seed, prompt id, sample, round) only, so that any
number of ranks draws the same ones.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cai_scale import ranks
from cai_scale.records import (
    Answer,
    Completion,
    Prompt,
    Response,
    Score,
    read_jsonl,
    write_jsonl,
)
from cai_scale.rollout.collect import requests_for
from cai_scale.rollout.sampler import PromptReader, Request, Sampler, TransformersSampler, cut
from cai_scale.training import adapters, fit
from cai_scale.training.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

STEPS = 1_000_000  # more than a round has


def round_of(round: int, step: int) -> int:
    """The `round` of the random numbers of a step: round · 10⁶ + step, both from 1.

    Rollouts before the training have the round itself, which is below; no two steps share one.
    """
    return round * STEPS + step


def one_pass(task: Task) -> int:
    """How many prompts a pass has: those that fill whole batches."""
    return len(task.prompts) // task.config.batch_size * task.config.batch_size


def order(task: Task) -> list[Prompt]:
    """The prompts of every step, one after another: passes in random orders, whole batches each.

    Laid out before the training, so that one which continues meets the prompts it would have met.
    """
    config, prompts, whole = task.config, task.prompts, one_pass(task)
    steps = config.steps or int(config.epochs * whole / config.batch_size)
    rows = steps * config.batch_size
    indices = [
        index
        for number in range(-(-rows // whole))
        for index in np.random.default_rng((config.seed, number)).permutation(len(prompts))[:whole]
    ]
    return [prompts[index] for index in indices[:rows]]


def in_order(task: Task) -> dict[str, Any]:
    """The arguments of a training whose data are laid out: one pass over them, in their order,
    and a checkpoint where a pass over the prompts ends."""
    return {
        "num_train_epochs": 1.0,
        "max_steps": -1,
        "save_strategy": "steps",
        "save_steps": one_pass(task) // task.config.batch_size,
    }


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One answer of the policy as it was at a step.

    Attributes:
        sample: its place among the prompt's answers, from 0.
        temperature: at which it was drawn.
        prompt_ids: the prompt's tokens, as the policy reads them.
        ids: the answer's tokens as they were drawn, the one that ended it included: at least
            one. A server tells no tokens: they are then those of its text.
        score: None for an empty answer.
    """

    prompt: Prompt
    sample: int
    temperature: float
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    completion: Completion
    score: Score | None

    def answer(self, round: int) -> Answer:
        """As a record; an empty answer has the score 0."""
        response = Response(
            prompt_id=self.prompt.id,
            sample=self.sample,
            round=round,
            temperature=self.temperature,
            text=self.completion.text,
            tokens=self.completion.tokens,
            finished=self.completion.finished,
        )
        return Answer(prompt=self.prompt, response=response, score=self.score or Score({}, 0.0))


class LivePolicy:
    """The policy while it is trained, asked by all ranks together.

    Without `task.sampler` the answers come from the weights in this process. With it, the policy
    is saved at every step, as an adapter or a model, and `task.sampler(folder)` answers; while
    a new adapter has learned nothing, `task.sampler(None)` does, from the base model. The factory
    is called on every rank; what it makes for them all, such as an exported graph, it puts beside
    that folder, in `folder.parent`, which is removed when all ranks have answered.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: "PreTrainedTokenizerBase",
        finish: Callable[[Path], None] | None = None,
        *,
        folder: str = ".live",
    ) -> None:
        """
        Args:
            finish: what makes an ordinary adapter or model of what is saved, as for `fit.fit`.
            folder: the name of that in which the ranks meet, its own.
        """
        self.task, self.tokenizer, self._finish = task, tokenizer, finish
        self._reader = PromptReader(tokenizer)
        self._folder = task.into.path / folder
        self._meetings = 0
        if task.ranks.main:
            shutil.rmtree(self._folder, ignore_errors=True)  # of a start that was killed
            self._folder.mkdir(parents=True)
        ranks.agree(task.ranks, None)  # nobody writes before that
        if task.ranks.main and task.sampler is None and _shards_weights(task):
            print(
                "ZeRO-3: every rank gathers the whole weights to sample, once a step; where they "
                "do not fit, sample from a server with --sampler openai",
                flush=True,
            )

    def close(self) -> None:
        """Remove what the last step has left. For the end, when all ranks have their answers."""
        if self.task.ranks.main:
            shutil.rmtree(self._folder, ignore_errors=True)

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's tokens, as the policy reads them."""
        return self._reader.tokens(Request(messages=prompt.messages, prompt_id=prompt.id))

    def sample(
        self,
        trainer: "Trainer",
        prompts: Sequence[Prompt],
        samples: int,
        temperatures: Sequence[float],
        *,
        round: int | None = None,
    ) -> list[Sampled]:
        """Answer each prompt `samples` times from the weights of the step under way, and score.

        Every rank calls this with the same arguments, answers and scores its share, and gets all
        answers. No collective is open meanwhile: a slow rank meets no communication timeout.

        Args:
            temperatures: they take turns over a prompt's samples.
            round: of the random numbers; the step's own where it is None.

        Returns:
            The answers to the first prompt in order, then those to the next.
        """
        config, peers = self.task.config, self.task.ranks
        step = trainer.state.global_step + 1
        round = round_of(self.task.round, step) if round is None else round
        requests = requests_for(
            prompts, temperatures, samples=samples, seed=config.seed, round=round
        )
        with self._sampler(trainer, step) as sampler:
            batches = cut(sampler, requests, self._batch_size(len(requests)))
            answered = list(sampler.sample(batches[peers.rank :: peers.world]))
        everywhere = self.exchange(self._score(prompts, answered))
        if peers.main:
            shutil.rmtree(self._policy(step).parent, ignore_errors=True)
        found = {(record["prompt_id"], record["sample"]): record for record in everywhere}
        return [
            self._sampled(prompt, found[prompt.id, sample])
            for prompt in prompts
            for sample in range(samples)
        ]

    def _batch_size(self, requests: int) -> int:
        """The largest batches, of one size, in which every rank gets an equal share."""
        share = -(-requests // self.task.ranks.world)
        turns = -(-share // self.task.config.rollout_batch_size)
        return -(-share // turns)

    def _policy(self, step: int) -> Any:
        return self._folder / f"step-{step}" / "policy"

    @contextmanager
    def _sampler(self, trainer: "Trainer", step: int) -> Iterator[Sampler]:
        if self.task.sampler is None:
            with self._weights(trainer) as model:
                config = self.task.config
                yield TransformersSampler(
                    lambda: model,
                    self.tokenizer,
                    max_new_tokens=config.max_new_tokens,
                    top_p=config.top_p,
                    top_k=config.top_k,
                )
            return
        policy = self._policy(step)
        aside = policy.with_name("saving")
        fit.save(self.task, trainer, aside)
        if self.task.ranks.main:
            if self._finish is not None:
                self._finish(aside)
            aside.rename(policy)
        ranks.wait_for(policy)
        base = self.task.config.lora and adapters.is_new(policy)
        yield self.task.sampler(None if base else policy)

    @contextmanager
    def _weights(self, trainer: Any) -> Iterator[Any]:
        """The model in evaluation mode, whole on every rank. Collective under ZeRO-3."""
        from trl.models import unwrap_model_for_generation

        with unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model:
            training = model.training
            yield model.eval()
            model.train(training)

    def _score(
        self, prompts: Sequence[Prompt], answered: Sequence[tuple[Request, Completion]]
    ) -> list[dict[str, Any]]:
        assert self.task.critic is not None
        text_of = {prompt.id: prompt.text for prompt in prompts}
        scores = self.task.critic.score(
            [text_of[request.prompt_id] for request, _ in answered],
            [completion.text for _, completion in answered],
        )
        return [
            {
                "prompt_id": request.prompt_id,
                "sample": request.sample,
                "temperature": request.temperature,
                "completion": [c.text, c.tokens, c.finished, c.ids],
                "score": score and [dict(score.principles), score.overall],
            }
            for (request, c), score in zip(answered, scores, strict=True)
        ]

    def exchange(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What every rank has brought, on every rank, through files."""
        self._meetings += 1
        own, world = self.task.ranks.rank, self.task.ranks.world
        write_jsonl(self._folder / f"{self._meetings}-{own}.jsonl", records)
        files = [self._folder / f"{self._meetings}-{rank}.jsonl" for rank in range(world)]
        for file in files:
            ranks.wait_for(file)
        # All have come to this meeting, so all have read what was brought to the last one.
        (self._folder / f"{self._meetings - 1}-{own}.jsonl").unlink(missing_ok=True)
        return [record for file in files for _, record in read_jsonl(file)]

    def _sampled(self, prompt: Prompt, record: dict[str, Any]) -> Sampled:
        text, tokens, finished, ids = record["completion"]
        if ids is None:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            # An answer that was cut before it said anything still needs a token.
            ids = [*ids, self.tokenizer.eos_token_id] if finished or not ids else ids
        return Sampled(
            prompt=prompt,
            sample=record["sample"],
            temperature=record["temperature"],
            prompt_ids=self.prompt_ids(prompt),
            ids=tuple(ids),
            completion=Completion(text, tokens, finished, tuple(ids)),
            score=record["score"] and Score(*record["score"]),
        )


def _shards_weights(task: Task) -> bool:
    return task.ds_config is not None and task.ds_config["zero_optimization"]["stage"] == 3
