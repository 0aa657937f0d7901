"""DPO with LoRA on preference pairs, by TRL's DPOTrainer.

Rafailov et al. 2023 (arXiv 2305.18290), equation 7: the loss is
-log σ(β [(log π(y⁺) - log π_ref(y⁺)) - (log π(y⁻) - log π_ref(y⁻))]), the mean over pairs.
The reference is the base model, which is the trained model with its adapter switched off, so
no second copy is kept.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cai_scale.config import Config
from cai_scale.errors import ConfigError
from cai_scale.ranks import Ranks
from cai_scale.records import Pair
from cai_scale.runs import Run
from cai_scale.training.precision import Precision


def train(
    config: Config,
    pairs: Sequence[Pair],
    run: Run,
    *,
    ranks: Ranks,
    precision: Precision,
    ds_config: dict[str, Any] | None,
) -> None:
    """Train an adapter on `pairs` and leave it, checked, in `run.adapter`.

    Continues from the newest checkpoint in `run.checkpoints`, where there is one. Called on
    every rank.

    Raises:
        IntegrityError: the saved adapter is not the trained one.
    """
    from transformers import ProgressCallback
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from trl import DPOTrainer

    from cai_scale.training import adapters
    from cai_scale.training.callbacks import MetricsLog, ProgressBar
    from cai_scale.training.models import load_model, load_tokenizer

    # These arguments switch ZeRO-3's partitioned loading on: they come before the model.
    rows = whole_batches(pairs, config.batch_size)
    arguments = _arguments(config, len(rows), run, ranks, precision, ds_config)
    trainer = DPOTrainer(
        model=load_model(config.model, precision.dtype),
        ref_model=None,
        args=arguments,
        train_dataset=_dataset(rows),
        processing_class=load_tokenizer(config.model),
        peft_config=adapters.lora(config.lora_r, config.lora_alpha, config.lora_dropout),
        callbacks=[MetricsLog(run.metrics)],
    )
    if ranks.main:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar(loss="loss", margin="rewards/margins"))
    if len(trainer.train_dataset) < len(rows):
        raise ConfigError(
            f"the prompts of {len(rows) - len(trainer.train_dataset)} pairs fill --max_length "
            f"{config.max_length}; raise it, or shorten the prompts"
        )
    expected = adapters.adapter_shapes(trainer.model)
    trainer.train(resume_from_checkpoint=newest_checkpoint(run.checkpoints))

    aside = run.adapter.with_name(".adapter")
    trainer.save_model(str(aside))  # a collective under ZeRO-3: every rank takes part
    trainer.accelerator.wait_for_everyone()
    # The arguments live on in accelerate's state; models loaded from here on are not sharded.
    unset_hf_deepspeed_config()
    if ranks.main:
        _keep_only_the_adapter(aside)
        adapters.check_adapter(aside, expected)
        shutil.rmtree(run.adapter, ignore_errors=True)
        aside.rename(run.adapter)


def whole_batches(pairs: Sequence[Pair], batch_size: int) -> list[Pair]:
    """As many pairs as fill batches, in order; the closest pairs are left out.

    An incomplete batch would hold other rows on another number of ranks.
    """
    count = len(pairs) // batch_size * batch_size
    gaps = [pair.chosen.score - pair.rejected.score for pair in pairs]
    widest = sorted(range(len(pairs)), key=lambda index: -gaps[index])[:count]
    return [pairs[index] for index in sorted(widest)]


def newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint to which the trainer has written its state, which comes last."""
    states = folder.glob("checkpoint-*/trainer_state.json")
    newest = max(states, key=lambda state: int(state.parent.name.split("-")[1]), default=None)
    return str(newest.parent) if newest else None


def _arguments(
    config: Config,
    rows: int,
    run: Run,
    ranks: Ranks,
    precision: Precision,
    ds_config: dict[str, Any] | None,
) -> Any:
    import torch
    from trl import DPOConfig

    from cai_scale.training.batches import plan_batch

    batch = plan_batch(config.batch_size, config.micro_batch_size, ranks.world)
    steps = config.epochs * rows / config.batch_size
    return DPOConfig(
        output_dir=str(run.checkpoints),
        deepspeed=ds_config,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if ranks.world > 1 and not torch.cuda.is_available() else None,
        bf16=precision.name == "bf16",
        fp16=precision.name == "fp16",
        gradient_checkpointing=config.gradient_checkpointing,
        per_device_train_batch_size=batch.per_rank,
        gradient_accumulation_steps=batch.accumulation,
        dataloader_drop_last=True,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        # A tenth of the steps; none where they are few, so that one step still learns.
        warmup_steps=int(0.1 * steps),
        beta=config.beta,
        max_length=config.max_length,
        seed=config.seed,
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=not ranks.main,
    )


def _dataset(pairs: Sequence[Pair]) -> Any:
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


def _keep_only_the_adapter(folder: Path) -> None:
    """The trainer also writes its arguments as a pickle, and the base model's tokenizer."""
    from cai_scale.training.adapters import CONFIG, WEIGHTS

    for path in folder.iterdir():
        if path.name not in (CONFIG, WEIGHTS):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
