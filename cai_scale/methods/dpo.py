"""DPO on preference pairs, by TRL's DPOTrainer.

Rafailov et al. 2023 (arXiv 2305.18290), equation 7: the loss is
-log σ(β [(log π(y⁺) - log π_ref(y⁺)) - (log π(y⁻) - log π_ref(y⁻))]), the mean over pairs.
The reference is the base model, in every round and whatever the training continues from. Its
log-probabilities do not change while the policy is trained: they are computed once for all pairs,
kept beside these, and read by every start that continues the training.

The source's loss, `--loss margin`, has no reference: -log σ(Δℓ - m), where Δℓ = log π(y⁺) -
log π(y⁻) and m is `--loss_margin`. Nothing holds the policy near the base model but the learning
rate. All other losses are TRL's, by their names there.
"""

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cai_scale.errors import ConfigError, DataError
from cai_scale.ranks import agree
from cai_scale.records import Pair
from cai_scale.training import adapters, base, fit, references
from cai_scale.training.models import load_tokenizer
from cai_scale.training.references import Reference
from cai_scale.training.task import Task


def train(task: Task) -> None:
    """Train on `task.pairs`. Called on every rank.

    Raises:
        ConfigError: a prompt fills `--max_length`.
        DataError: the base model gives a pair no finite log-probability.
        IntegrityError: the saved adapter is not the trained one.
    """
    from trl import DPOConfig

    from cai_scale.training.callbacks import AtStart

    config = task.config
    pairs = fit.whole_batches(task.pairs, config.batch_size, gap)
    margin = config.loss_margin if config.loss == "margin" else None
    arguments = fit.arguments(
        task,
        DPOConfig,
        rows=len(pairs),
        beta=config.beta if margin is None else 1.0,
        loss_type=config.loss if margin is None else "sigmoid",
        # Where it trains the whole model, TRL loads a second one unless told so. Where it trains
        # an adapter it never does, and told so it would hash every weight for a cache of its own.
        precompute_ref_log_probs=not config.lora,
        max_length=config.max_length,
    )
    trainer = _trainer()(
        model=fit.policy(task),
        args=arguments,
        train_dataset=dataset(pairs),
        processing_class=load_tokenizer(config.model),
        peft_config=adapters.lora(config) if config.lora else None,
    )
    if len(trainer.train_dataset) < len(pairs):
        raise ConfigError(
            f"the prompts of {len(pairs) - len(trainer.train_dataset)} pairs fill --max_length "
            f"{config.max_length}; raise it, or shorten the prompts"
        )
    trainer.train_dataset = trainer.train_dataset.to_list()  # rows that can be filled later
    trainer.precompute_ref_logps = True  # its loss reads the reference from the rows
    if margin is None:
        # The model that trains is the one that ZeRO has set up, so the reference is taken from
        # it, as it is before the first step, and no second engine ever holds its weights.
        trainer.add_callback(AtStart(lambda: _fill(trainer, _references(task, trainer, pairs))))
    else:  # with these and β = 1 the sigmoid loss is -log σ(Δℓ - m)
        _fill(
            trainer, (Reference(prompt_id=p.prompt_id, chosen=margin, rejected=0.0) for p in pairs)
        )
    fit.fit(task, trainer, loss="loss", margin="rewards/margins")


def _trainer() -> Any:
    from trl import DPOTrainer

    class Trainer(DPOTrainer):
        """A DPOTrainer whose rows are given their reference by whoever makes it."""

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            return dataset

    return Trainer


def _fill(trainer: Any, found: Iterable[Reference]) -> None:
    """Write the reference's log-probabilities into the rows, where TRL's loss looks for them."""
    for row, reference in zip(trainer.train_dataset, found, strict=True):
        row["ref_chosen_logps"] = reference.chosen
        row["ref_rejected_logps"] = reference.rejected


def _references(task: Task, trainer: Any, pairs: Sequence[Pair]) -> list[Reference]:
    """What the base model gives the pairs: as an earlier start has kept it, or computed and kept
    now. Collective: every rank takes part."""
    assert task.references is not None
    rows = trainer.train_dataset
    tokens = ([row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] for row in rows)
    key, kept = {}, None
    if task.ranks.main:
        key = references.key(task.config, task.precision.name, task.weights, tokens)
        kept = references.read(task.references, key)
    kept = agree(task.ranks, kept)
    if kept is not None:
        return kept
    found = [
        Reference(prompt_id=pair.prompt_id, chosen=chosen, rejected=rejected)
        for pair, (chosen, rejected) in zip(pairs, _compute(task, trainer), strict=True)
    ]
    gc.collect()  # a base model that was loaded for this has cycles
    if task.ranks.main:
        references.write(task.references, key, found)
    return found


def _compute(task: Task, trainer: Any) -> list[tuple[float, float]]:
    """One pass of the base model over all rows, which the ranks share."""
    import torch
    from tqdm.auto import tqdm

    rows, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    share = len(rows) // task.ranks.world  # whole batches divide over the ranks
    mine = range(share * task.ranks.rank, share * (task.ranks.rank + 1))
    found = []
    with _base(task, trainer) as model:
        for start in tqdm(range(0, share, size), "reference", disable=not task.ranks.main):
            batch = trainer.data_collator([rows[i] for i in mine[start : start + size]])
            logps = trainer.compute_ref_log_probs(model, trainer._prepare_inputs(batch))
            found.append(torch.stack(logps, dim=1).float())
    gathered = trainer.accelerator.gather(torch.cat(found))
    if not bool(gathered.isfinite().all()):
        raise DataError(
            f"the base model gives some pairs no finite log-probability in {task.precision.name}; "
            f"choose another --precision, or leave these pairs out"
        )
    return [(chosen, rejected) for chosen, rejected in gathered.tolist()]


@contextmanager
def _base(task: Task, trainer: Any) -> Iterator[Any]:
    """The base model, as `compute_ref_log_probs` takes it: the model in training, which that
    switches the adapter of off; or, where all of it is trained, one that is loaded for this block.
    """
    if task.config.lora:
        yield trainer.model.eval()  # a training step sets it back
        return
    with base.loaded(task, trainer) as model:
        yield model


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
