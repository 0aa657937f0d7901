"""The graph of a run's current policy, for rollouts: what a bundle's model needs and no more."""

from typing import TYPE_CHECKING

from cai_scale.training import models

if TYPE_CHECKING:
    pass


def fusible(model: str) -> bool:
    """Whether there is a fused graph for the architecture of a model, by its name."""
    from .fuse import knows

    return knows(models.load_config(model))
