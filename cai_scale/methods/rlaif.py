"""The source's RLAIF: the model learns its own revised answers, and to predict the critic.

L = L_LM(x + y) + λ·h·(r̂ - s)², the mean over rows: prompt x, answer y, the critic's score s, and r̂,
a linear head's output on the state of the row's last token. L_LM is the mean negative
log-probability of a row's predicted tokens, those of the prompt among them; all but the first
token are predicted. λ is `--reward_weight`, h is `--reward_scale`: ½ in the source's algorithm, 1
in its worked examples.

Every row weighs the same, however long it is, while transformers' own loss is the mean over all
tokens of a batch. Dropout of the base model is off, so that the result depends neither on how a
batch is spread over ranks nor on the rows beside a row.

Nothing here pushes towards answers that score higher: the model learns all that it is given. It is
the baseline that the other methods must beat.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from cai_scale.errors import ConfigError
from cai_scale.records import Answer, Prompt
from cai_scale.runs import Trained
from cai_scale.training import adapters, fit, reward_head
from cai_scale.training.live import LivePolicy, in_order, one_pass, order
from cai_scale.training.models import load_tokenizer
from cai_scale.training.positions import positions
from cai_scale.training.scorer import HEAD
from cai_scale.training.task import Task


def train(task: Task) -> None:
    """Train on `task.answers`, all of them, or with `--refresh step` on new answers to
    `task.prompts` at every step. Called on every rank.

    The product is an ordinary adapter or model; the head goes to `task.into.head`.

    Raises:
        ConfigError: a prompt fills `--max_length`.
        IntegrityError: the saved adapter is not the trained one.
    """
    if task.config.refresh == "step":
        on_fresh_answers(task)
    else:
        on_answers(task)


def on_answers(task: Task) -> None:
    """Learn `task.answers`, which were sampled when the round began."""
    config = task.config
    answers = fit.whole_batches(task.answers, config.batch_size, lambda answer: 0.0)
    tokenizer = load_tokenizer(config.model)
    arguments = fit.arguments(
        task, TrainingArguments, rows=len(answers), remove_unused_columns=False
    )
    trainer = RewardedTrainer(
        model=policy(task),
        args=arguments,
        train_dataset=rows(answers, tokenizer, config.max_length),
        data_collator=partial(batch, pad=tokenizer.pad_token_id),
        weight=config.reward_weight * config.reward_scale,
    )
    _fit(task, trainer)


def on_fresh_answers(task: Task) -> None:
    """Learn answers that are sampled at every step, from the weights as they are by then."""
    config = task.config
    asked, tokenizer = order(task), load_tokenizer(config.model)
    arguments = fit.arguments(
        task,
        TrainingArguments,
        rows=one_pass(task),
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        **in_order(task),
    )
    with closing(LivePolicy(task, tokenizer, _split_head(task))) as live:
        trainer = FreshTrainer(
            live=live,
            asked=asked,
            model=policy(task),
            args=arguments,
            train_dataset=[{"place": place} for place in range(len(asked))],
            data_collator=partial(batch, pad=tokenizer.pad_token_id),
            weight=config.reward_weight * config.reward_scale,
        )
        _fit(task, trainer)


def _fit(task: Task, trainer: Trainer) -> None:
    fit.fit(
        replace(task, start=None),  # the policy is there already, and its head with it
        trainer,
        finish=_split_head(task),
        loss="loss",
        reward="reward_loss",
        correlation="correlation",
    )


def _split_head(task: Task) -> Callable[[Path], None]:
    return partial(reward_head.split, head=task.into.head)


def policy(task: Task) -> Any:
    """The model to train, its reward head attached, and LoRA around both."""
    from peft import get_peft_model
    from trl.trainer.utils import disable_dropout_in_model

    config = task.config
    model = fit.policy(task)
    separate = config.reward_backbone == "separate"
    copy = fit.policy(replace(task, start=None)) if separate else None
    set_seed(config.seed)  # the new head and adapter are the same on every rank
    reward_head.attach(model, copy=copy, detached=config.reward_backbone == "detached")
    disable_dropout_in_model(model)
    if config.lora:
        model = get_peft_model(model, adapters.lora(config, whole=[HEAD]))
    if task.start is not None:
        reward_head.load(model, task.start, Trained(task.start.parent).head)
    return model


def rows(
    answers: Sequence[Answer], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, Any]]:
    """`input_ids` of prompt and answer as the chat template renders them, and the `score`.

    An answer that is too long is cut at its end.

    Raises:
        ConfigError: prompts leave no room for an answer.
    """
    found, full = [], 0
    for answer in answers:
        messages = list(answer.prompt.messages)
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        reply = {"role": "assistant", "content": answer.response.text}
        whole = tokenizer.apply_chat_template([*messages, reply], return_dict=True)["input_ids"]
        full += len(prompt) >= max_length
        found.append({"input_ids": whole[:max_length], "score": answer.score.overall})
    if full:
        raise ConfigError(
            f"the prompts of {full} answers fill --max_length {max_length}; raise it, or shorten "
            f"the prompts"
        )
    return found


def batch(rows: Sequence[dict[str, Any]], pad: int) -> dict[str, Any]:
    """Rows padded on the right: `input_ids` and `attention_mask`, [rows, tokens], int64.

    `scores` are plain numbers: a tensor of them would be rounded to bf16 under DeepSpeed.
    """
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "scores": [row["score"] for row in rows],
    }


def lm_losses(log_probs: Tensor, attention_mask: Tensor) -> Tensor:
    """L_LM of each row, [rows], fp32: the mean over its tokens but the first, in nats.

    Args:
        log_probs: [rows, tokens - 1], of each token but the first; 0 where there is none.
        attention_mask: [rows, tokens], int64; padded on either side.
    """
    return -log_probs.sum(-1) / (attention_mask.sum(-1) - 1)


def loss(lm: Tensor, predicted: Tensor, scores: Tensor, weight: float) -> Tensor:
    """The mean over rows of L_LM + λ·h·(r̂ - s)²; all [rows].

    Args:
        weight: λ·h.
    """
    return (lm + weight * (predicted - scores) ** 2).mean()


class RewardedTrainer(Trainer):
    """transformers' Trainer with this loss, and with its parts in the logs."""

    # Each micro-batch gives its mean, and there are as many rows in one as in the next.
    loss_is_scaled_for_ga = False

    def __init__(self, *, weight: float, **trainer: Any) -> None:
        super().__init__(**trainer)
        self.weight = weight
        self._seen: list[Tensor] = []

    def compute_loss(self, model: Any, inputs: dict[str, Any], **_: Any) -> Tensor:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        scores = torch.tensor(inputs["scores"], device=ids.device)
        outputs = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            predict=True,
        )
        lm, predicted = lm_losses(outputs["log_probs"], mask), outputs[reward_head.PREDICTED]
        self._seen.append(torch.stack([lm, predicted, scores], -1).detach())
        return loss(lm, predicted, scores, self.weight)

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Called at the same steps on every rank, and so is the collective."""
        if self._seen:
            lm, predicted, scores = self.accelerator.gather(torch.cat(self._seen)).double().T
            self._seen.clear()
            logs |= figures(lm, predicted, scores)
        super().log(logs, *args)


class FreshTrainer(RewardedTrainer):
    """Answers the prompts of each step with the weights as they are by then, and learns those.

    The answers are not revised, and an empty one has the score 0.
    """

    def __init__(
        self, *, live: LivePolicy, asked: Sequence[Prompt], data_collator: Any, **trainer: Any
    ) -> None:
        super().__init__(data_collator=default_data_collator, **trainer)
        self.live, self.asked, self._batch = live, asked, data_collator
        self._step, self._tokens = -1, 0
        self._rows: list[dict[str, Any]] = []

    def _prepare_inputs(self, inputs: Any) -> Any:
        if self._step != self.state.global_step:
            self._step = self.state.global_step
            self._rows = self._sample()
        first = self._step * self.live.task.config.batch_size
        places = inputs["place"].tolist()
        return super()._prepare_inputs(self._batch([self._rows[p - first] for p in places]))

    def _sample(self) -> list[dict[str, Any]]:
        config = self.live.task.config
        first = self._step * config.batch_size
        prompts = self.asked[first : first + config.batch_size]
        sampled = self.live.sample(self, prompts, 1, config.temperatures)
        self._tokens = sum(one.completion.tokens for one in sampled)
        answers = [one.answer(self.live.task.round) for one in sampled]
        return rows(answers, self.live.tokenizer, config.max_length)

    def log(self, logs: dict[str, float], *args: Any) -> None:
        if self._seen:
            logs |= {"sampled_tokens": self._tokens}
        super().log(logs, *args)


def figures(lm: Tensor, predicted: Tensor, scores: Tensor) -> dict[str, float]:
    """What a step logs of its rows, over all ranks: [rows] each.

    The correlation is Pearson's, and is left out where either side is constant.
    """
    found = {
        "lm_loss": float(lm.mean()),
        "reward_loss": float(((predicted - scores) ** 2).mean()),
        "critic_score": float(scores.mean()),
    }
    if bool((predicted != predicted[0]).any()) and bool((scores != scores[0]).any()):
        found["correlation"] = float(torch.corrcoef(torch.stack([predicted, scores]))[0, 1])
    return found
