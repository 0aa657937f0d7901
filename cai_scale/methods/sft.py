"""Supervised fine-tuning on each prompt's best answer after revision, by TRL's SFTTrainer.

The first stage of constitutional AI (Bai et al. 2022, arXiv 2212.08073, section 3), and a start
for the other methods (`--start`). The loss is the mean negative log-probability of the answers'
tokens; prompts are read and not learned.
"""

from collections.abc import Sequence
from typing import Any

from cai_scale.records import Answer
from cai_scale.training import adapters, fit
from cai_scale.training.models import load_tokenizer
from cai_scale.training.task import Task


def train(task: Task) -> None:
    """Train on the best of `task.answers` to each prompt. Called on every rank.

    Raises:
        IntegrityError: the saved adapter is not the trained one.
    """
    from trl import SFTConfig, SFTTrainer

    config = task.config
    rows = fit.whole_batches(best(task.answers), config.batch_size, lambda a: a.score.overall)
    arguments = fit.arguments(
        task,
        SFTConfig,
        rows=len(rows),
        max_length=config.max_length,
        completion_only_loss=True,
    )
    trainer = SFTTrainer(
        model=fit.policy(task),
        args=arguments,
        train_dataset=dataset(rows),
        processing_class=load_tokenizer(config.model),
        peft_config=adapters.lora(config) if config.lora else None,
    )
    fit.fit(task, trainer, loss="loss", accuracy="mean_token_accuracy")


def best(answers: Sequence[Answer]) -> list[Answer]:
    """The answer with the highest score to each prompt, the earlier sample among equals."""
    found: dict[str, Answer] = {}
    for answer in sorted(answers, key=lambda a: (-a.score.overall, a.response.sample)):
        found.setdefault(answer.prompt.id, answer)
    return [found[prompt] for prompt in dict.fromkeys(a.prompt.id for a in answers)]


def dataset(answers: Sequence[Answer]) -> Any:
    """The answers as TRL reads them: a conversation, and the answer that completes it."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "prompt": list(answer.prompt.messages),
                "completion": [{"role": "assistant", "content": answer.response.text}],
            }
            for answer in answers
        ]
    )
