"""How a global batch is spread over ranks and accumulation steps."""

from dataclasses import dataclass

from cai_scale.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """`per_rank` rows at once on each rank, `accumulation` times a step."""

    per_rank: int
    accumulation: int


def plan_batch(batch_size: int, micro_batch_size: int, world: int) -> BatchPlan:
    """Spread `batch_size` rows over `world` ranks, at most `micro_batch_size` at once on each.

    The global batch stays as it is for any number of ranks, so that the training does too.

    Raises:
        ConfigError: the batch does not divide evenly.
    """
    if batch_size % world:
        raise ConfigError(
            f"--batch_size {batch_size} does not divide over {world} ranks; use a multiple of "
            f"{world}"
        )
    share = batch_size // world
    per_rank = max(n for n in range(1, min(share, micro_batch_size) + 1) if share % n == 0)
    return BatchPlan(per_rank, share // per_rank)
