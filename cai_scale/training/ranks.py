"""Which rank this process is, and how ranks meet without a collective left open.

Ranks share the run's folder. A stage's product appears there by a rename, and the ranks that
need it wait for the file: a slow rank then holds up nobody's communication timeout.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, as a launcher's environment says; alone without one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0


def from_environment() -> Ranks:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE, as deepspeed and torchrun set them."""

    def number(name: str, default: int) -> int:
        return int(os.environ.get(name, default))

    world = number("WORLD_SIZE", 1)
    local_world = number("LOCAL_SIZE", number("LOCAL_WORLD_SIZE", world))
    return Ranks(number("RANK", 0), world, number("LOCAL_RANK", 0), local_world)


def join(ranks: Ranks) -> None:
    """Share the cores among the local ranks, and form the process group where there are peers."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, (cores or 1) // ranks.local_world))
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
    if ranks.world > 1 and not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, rank=ranks.rank, world_size=ranks.world)


def leave() -> None:
    """Close the process group, where there is one."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def agree(ranks: Ranks, value: Any) -> Any:
    """Rank 0's value, on every rank. Short: never around work of unknown length."""
    if ranks.world == 1:
        return value
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def main_makes(ranks: Ranks, product: Path, make: Callable[[], None]) -> None:
    """Rank 0 makes a file that appears by a rename; the others wait for it."""
    if ranks.main and not product.exists():
        make()
    while not product.exists():
        time.sleep(POLL_SECONDS)
