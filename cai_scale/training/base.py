"""The base model beside one that is trained whole; under LoRA that one itself, without adapter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cai_scale.training import fit
from cai_scale.training.task import Task


@contextmanager
def loaded(task: Task, trainer: Any) -> Iterator[Any]:
    """The base model in evaluation mode, sharded as the trained one is, for this block.

    Every rank takes part, and under ZeRO-3 in each of its forward passes too.
    """
    from trl.models.utils import prepare_deepspeed
    from trl.trainer.utils import add_fused_lm_head

    model: Any = fit.policy(replace(task, start=None)).eval()
    add_fused_lm_head(model)
    if not trainer.is_deepspeed_enabled:
        yield model
        return
    engine = prepare_deepspeed(model, trainer.accelerator)
    try:
        yield engine
    finally:
        engine.destroy()
