"""DPO on preference pairs, by TRL's DPOTrainer.

Rafailov et al. 2023 (arXiv 2305.18290), equation 7: the loss is
-log σ(β [(log π(y⁺) - log π_ref(y⁺)) - (log π(y⁻) - log π_ref(y⁻))]), the mean over pairs.
The reference is the base model, in every round: under LoRA it is the trained model with its
adapter switched off, so no second copy is kept.

The source's loss, `--loss margin`, has no reference: -log σ(Δℓ - m), where Δℓ = log π(y⁺) -
log π(y⁻) and m is `--loss_margin`. Nothing holds the policy near the base model but the learning
rate. All other losses are TRL's, by their names there.
"""

from collections.abc import Sequence
from typing import Any

from cai_scale.errors import ConfigError
from cai_scale.records import Pair
from cai_scale.training import adapters, fit
from cai_scale.training.models import load_tokenizer
from cai_scale.training.task import Task


def train(task: Task) -> None:
    """Train on `task.pairs`. Called on every rank.

    Raises:
        ConfigError: a prompt fills `--max_length`.
        IntegrityError: the saved adapter is not the trained one.
    """
    from trl import DPOConfig, DPOTrainer

    config = task.config
    rows = fit.whole_batches(task.pairs, config.batch_size, gap)
    margin = config.loss_margin if config.loss == "margin" else None
    arguments = fit.arguments(
        task,
        DPOConfig,
        rows=len(rows),
        beta=config.beta if margin is None else 1.0,
        loss_type=config.loss if margin is None else "sigmoid",
        precompute_ref_log_probs=margin is not None,
        max_length=config.max_length,
    )
    trainer = (DPOTrainer if margin is None else _without_reference(margin))(
        model=fit.policy(task),
        args=arguments,
        train_dataset=dataset(rows),
        processing_class=load_tokenizer(config.model),
        peft_config=adapters.lora(config) if config.lora else None,
    )
    if len(trainer.train_dataset) < len(rows):
        raise ConfigError(
            f"the prompts of {len(rows) - len(trainer.train_dataset)} pairs fill --max_length "
            f"{config.max_length}; raise it, or shorten the prompts"
        )
    fit.fit(task, trainer, loss="loss", margin="rewards/margins")


def _without_reference(margin: float) -> Any:
    """A DPOTrainer whose reference gives each chosen answer the log-probability `margin`, and
    each rejected one 0: with β = 1 its sigmoid loss is -log σ(Δℓ - margin)."""
    from trl import DPOTrainer

    class MarginTrainer(DPOTrainer):
        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            chosen, rejected = [margin] * len(dataset), [0.0] * len(dataset)
            return dataset.add_column("ref_chosen_logps", chosen).add_column(
                "ref_rejected_logps", rejected
            )

    return MarginTrainer


def gap(pair: Pair) -> float:
    """How much the critic prefers the chosen answer."""
    return pair.chosen.score - pair.rejected.score


def dataset(pairs: Sequence[Pair]) -> Any:
    """The pairs as TRL reads them: a conversation, and the two answers to it."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "prompt": list(pair.messages),
                "chosen": [{"role": "assistant", "content": pair.chosen.text}],
                "rejected": [{"role": "assistant", "content": pair.rejected.text}],
            }
            for pair in pairs
        ]
    )
