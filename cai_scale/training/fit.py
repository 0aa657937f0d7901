"""What all trainings share: their arguments, the model they start from, and how they end."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cai_scale.errors import DataError
from cai_scale.training import adapters, models
from cai_scale.training.batches import plan_batch
from cai_scale.training.task import Task

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer

T = TypeVar("T")


def arguments(task: Task, kind: type[T], *, rows: int, **own: Any) -> T:
    """The `TrainingArguments` of a task. They switch ZeRO-3's partitioned loading on, so they
    are made before the model is loaded.

    Args:
        kind: `TrainingArguments` itself, or what a trainer of TRL derives from it.
        rows: how many rows an epoch has: a multiple of the batch size.
        own: the arguments of this method alone; they replace the common ones.
    """
    import torch

    config, world = task.config, task.ranks.world
    gpu = torch.cuda.is_available()
    batch = plan_batch(config.batch_size, config.micro_batch_size, world)
    steps = config.steps or int(config.epochs * rows / config.batch_size)
    common = {
        "output_dir": str(task.into.checkpoints),
        "deepspeed": task.ds_config,
        "use_cpu": not gpu,
        "ddp_backend": "gloo" if world > 1 and not gpu else None,
        "bf16": task.precision.name == "bf16",
        "fp16": task.precision.name == "fp16",
        "gradient_checkpointing": config.gradient_checkpointing,
        "per_device_train_batch_size": batch.per_rank,
        "gradient_accumulation_steps": batch.accumulation,
        "dataloader_drop_last": True,
        "num_train_epochs": config.epochs,
        "max_steps": config.steps or -1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        # A tenth of the steps; none where they are few, so that one step still learns.
        "warmup_steps": steps // 10,
        "seed": config.seed,
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": list(config.report_to),
        "disable_tqdm": not task.ranks.main,
    }
    return kind(**{**common, **own})


def policy(task: Task) -> "PreTrainedModel":
    """The model to train, on this rank: the base model, or the whole model to continue from.

    It computes without padding, and TRL's trainers take its log-probabilities without waste.
    """
    from cai_scale.training import log_probs, packing
    from cai_scale.training.quantised import four_bits

    config, dtype = task.config, _trained_dtype(task)
    if config.lora:
        quantization = four_bits() if config.qlora else None
        model = models.load_model(config.model, dtype, quantization=quantization)
    else:
        model = models.load_model(str(task.start or config.model), dtype).train()
    packing.install(model)
    log_probs.install()
    return model


def _trained_dtype(task: Task) -> "torch.dtype":
    """The format in which the base model is loaded to be trained."""
    import torch

    # The optimizer moves fp32 weights; mixed precision computes with copies of them.
    return task.precision.dtype if task.config.lora else torch.float32


def scorer(task: Task, labels: Sequence[str]) -> "PreTrainedModel | PeftModel":
    """The reward model to train, on this rank: the base model, or the whole model to continue
    from, with a score head, which is new where the model has none; under LoRA with its adapter.

    It has no dropout but LoRA's own, so that a step depends on its rows alone.
    """
    from trl.trainer.utils import disable_dropout_in_model

    from cai_scale.training import packing
    from cai_scale.training.quantised import four_bits
    from cai_scale.training.scorer import HEAD

    config = task.config
    whole = task.start if not config.lora else None
    model = models.load_scorer(
        str(whole or config.model),
        _trained_dtype(task),
        labels,
        new_head=True,
        seed=config.seed,
        objective=config.objective,
        quantization=four_bits() if config.qlora else None,
    )
    disable_dropout_in_model(model)
    packing.install(model)
    if not config.lora:
        return model.train()
    settings = adapters.lora(config, task="SEQ_CLS", whole=[HEAD])
    adapted = adapters.adapt(model, settings, seed=config.seed)
    if config.gradient_checkpointing:  # frozen embeddings would end the way back
        adapted.enable_input_require_grads()
    return adapted


def fit(
    task: Task,
    trainer: "Trainer",
    *,
    finish: Callable[[Path], None] | None = None,
    **shown: str,
) -> None:
    """Train from the newest checkpoint, or from `task.start`; leave the checked product: the last
    state, or with `--guard_steps` the best: see `guard`.

    Args:
        finish: what is still to do, on the main rank, with the folder of what was saved, before
            that becomes the product.
        shown: figures for the progress bar: what to call each, and its key in the logs.

    Raises:
        IntegrityError: what was saved is not what was trained.
    """
    from transformers import ProgressCallback
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from cai_scale.training.callbacks import MetricsLog, ProgressBar
    from cai_scale.training.guard import Guard

    trainer.add_callback(MetricsLog(task.into.metrics))
    if task.ranks.main:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar(**shown))
    model: Any = trainer.model
    if task.config.lora and task.start is not None:
        adapters.load_into(model, task.start)
    expected = adapters.adapter_shapes(model) if task.config.lora else None
    mixed = task.ds_config is None and task.precision.name != "fp32"
    if mixed and task.config.collects:  # sampling while it trains is outside of autocast
        adapters.leave_formats_to_autocast(model)
    guard = Guard(task, trainer, finish) if task.config.guard_steps else None
    if guard is not None:
        trainer.add_callback(guard)
    trainer.train(resume_from_checkpoint=newest_checkpoint(task.into.checkpoints))

    aside = task.into.path / ".product"
    if guard is None:
        save(task, trainer, aside)
    trainer.accelerator.wait_for_everyone()
    # The arguments live on in accelerate's state; models loaded from here on are not sharded.
    unset_hf_deepspeed_config()
    if not task.ranks.main:
        return
    if guard is not None:
        guard.take_product(aside)
    if expected is not None:
        adapters.check_adapter(aside, expected)
    else:
        models.check(str(aside))
    if finish is not None:
        finish(aside)
    _replace(aside, task.into.model if expected is None else task.into.adapter)
    if guard is not None:
        guard.close()


def save(task: Task, trainer: "Trainer", folder: Path) -> None:
    """Write the adapter, or the whole model, as it is now; the main rank has it on return.

    Every rank takes part: under ZeRO-3 the weights are gathered.
    """
    trainer.save_model(str(folder))
    mixed = task.ds_config is not None and task.precision.name != "fp32"
    masters = adapters.masters(trainer.model) if task.config.lora and mixed else {}
    if not task.ranks.main:
        return
    if task.config.lora:
        adapters.keep_only_the_adapter(folder)
        adapters.overwrite(folder, masters)
    else:
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle


def _replace(aside: Path, product: Path) -> None:
    shutil.rmtree(product, ignore_errors=True)
    aside.rename(product)


def whole_batches(rows: Sequence[T], batch_size: int, weight: Callable[[T], float]) -> list[T]:
    """As many rows as fill batches, in order; those of the least weight are left out.

    An incomplete batch would hold other rows on another number of ranks.

    Raises:
        DataError: there are fewer rows than a batch has.
    """
    count = len(rows) // batch_size * batch_size
    if not count:
        raise DataError(
            f"{len(rows)} rows to train on, under the batch size {batch_size}; lower --batch_size, "
            f"or bring more prompts or --samples"
        )
    heaviest = sorted(range(len(rows)), key=lambda index: -weight(rows[index]))[:count]
    return [rows[index] for index in sorted(heaviest)]


def newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint to which the trainer has written its state, which comes last."""
    states = folder.glob("checkpoint-*/trainer_state.json")
    newest = max(states, key=lambda state: int(state.parent.name.split("-")[1]), default=None)
    return str(newest.parent) if newest else None
