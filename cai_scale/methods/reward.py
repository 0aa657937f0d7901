"""A reward model: a language model with a score head, trained to a critic's scores.

`--objective regression`: the head learns the score itself. The loss is the mean of (r - s)² over
answers and outputs: one output, the overall score, or with `--reward_outputs principles` one for
each of the constitution's principles, in its order.

`--objective bradley-terry`: the head learns which of two answers is better, by TRL's
RewardTrainer. The loss is the mean over pairs of -log σ(r⁺ - r⁻) (Bradley and Terry 1952; Ouyang
et al. 2022, arXiv 2203.02155, equation 1). Such a reward has no scale and no zero.

The model reads what a critic is given, the user's last message and the answer, through the chat
template, and is scored at the last token. It is used as `--critic reward:RUN`, and exported as
the scorer of a bundle by `cai-export --reward RUN`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments
from trl import RewardConfig, RewardTrainer

from cai_scale.errors import ConfigError
from cai_scale.records import Answer, exchange
from cai_scale.training import fit
from cai_scale.training.models import load_tokenizer
from cai_scale.training.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train(task: Task) -> None:
    """Train on `task.answers`, or with bradley-terry on `task.pairs`. Called on every rank.

    Raises:
        ConfigError: a conversation is longer than `--max_length`, or the critic gives no scores
            by principle where these are asked for.
        IntegrityError: what was saved is not what was trained.
    """
    if task.config.pairwise:
        bradley_terry(task)
    else:
        regression(task)


def regression(task: Task) -> None:
    """Learn each answer's score."""
    config = task.config
    labels = _labels(task)
    answers = fit.whole_batches(task.answers, config.batch_size, lambda answer: 0.0)
    tokenizer = load_tokenizer(config.model)
    texts = [(answer.prompt.text, answer.response.text) for answer in answers]
    targets = [[_score(answer, label) for label in labels] for answer in answers]
    arguments = fit.arguments(
        task, TrainingArguments, rows=len(answers), remove_unused_columns=False
    )
    trainer = RegressionTrainer(
        model=fit.scorer(task, labels),
        args=arguments,
        train_dataset=Dataset.from_dict(
            {"input_ids": encode(tokenizer, texts, config.max_length), "targets": targets}
        ),
        data_collator=collate,
        processing_class=tokenizer,
    )
    fit.fit(task, trainer, loss="loss")


def bradley_terry(task: Task) -> None:
    """Learn which answer of each pair is better."""
    config = task.config
    pairs = fit.whole_batches(
        task.pairs, config.batch_size, lambda pair: pair.chosen.score - pair.rejected.score
    )
    tokenizer = load_tokenizer(config.model)
    asked = [pair.messages[-1]["content"] for pair in pairs]
    answers = {
        "chosen_ids": [pair.chosen.text for pair in pairs],
        "rejected_ids": [pair.rejected.text for pair in pairs],
    }
    arguments = fit.arguments(
        task,
        RewardConfig,
        rows=len(pairs),
        max_length=None,  # checked here: TRL leaves longer pairs out without a word
        disable_dropout=False,  # done, but for LoRA's own
    )
    trainer = RewardTrainer(
        model=fit.scorer(task, ("overall",)),
        args=arguments,
        train_dataset=Dataset.from_dict(
            {
                column: encode(tokenizer, list(zip(asked, texts, strict=True)), config.max_length)
                for column, texts in answers.items()
            }
        ),
        processing_class=tokenizer,
    )
    fit.fit(task, trainer, loss="loss", accuracy="accuracy", margin="margin")


class RegressionTrainer(Trainer):
    """Trains a score head to the scores in the column `targets`."""

    loss_is_scaled_for_ga = False  # a mean over the rows at hand, of which there are always as many

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over rows and outputs of (r - s)²."""
        targets = inputs.pop("targets")
        outputs = model(**inputs)
        loss = torch.nn.functional.mse_loss(outputs.logits, targets)
        return (loss, outputs) if return_outputs else loss


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows of a batch, padded on the right; the mask, not the token, says what is padding."""
    tokens = [torch.tensor(row["input_ids"]) for row in rows]
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True),
        "targets": torch.tensor([row["targets"] for row in rows], dtype=torch.float32),
    }


def encode(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[tuple[str, str]], longest: int
) -> list[list[int]]:
    """The tokens of each prompt and its answer, as a critic or a bundle reads them.

    Raises:
        ConfigError: some are more than `longest`.
    """
    rows = [
        list(tokenizer.apply_chat_template(list(exchange(*text)), return_dict=True)["input_ids"])
        for text in texts
    ]
    over = sum(len(row) > longest for row in rows)
    if over:
        raise ConfigError(
            f"{over} answers are with their prompts longer than --max_length {longest}, at most "
            f"{max(map(len, rows))} tokens; raise it"
        )
    return rows


def _labels(task: Task) -> tuple[str, ...]:
    """What the outputs of the head score; critics give principles in the constitution's order."""
    if task.config.reward_outputs == "overall":
        return ("overall",)
    principles = tuple(task.answers[0].score.principles)
    if not principles:
        raise ConfigError(
            f"--reward_outputs principles: critic {task.config.critic} gives only one score; use "
            f"--reward_outputs overall, or another critic"
        )
    return principles


def _score(answer: Answer, label: str) -> float:
    return answer.score.overall if label == "overall" else answer.score.principles[label]
