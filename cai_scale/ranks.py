"""Which rank this process is, and how ranks meet without a collective left open.

Ranks share the run's folder. A stage's product appears there by a rename, and the ranks that
need it wait for the file: a slow rank then holds up nobody's communication timeout.
"""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_scale.errors import ConfigError

POLL_SECONDS = 0.2
SHARED_MEMORY = Path("/dev/shm")  # where Linux shows what shm_open has made


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
        text = os.environ.get(name, str(default))
        if not text.isdecimal():
            raise ConfigError(f"{name}={text!r}: expected a number, as a launcher sets it")
        return int(text)

    world = number("WORLD_SIZE", 1)
    local_world = number("LOCAL_SIZE", number("LOCAL_WORLD_SIZE", world))
    if world < 1 or number("RANK", 0) >= world:
        raise ConfigError(
            f"RANK={number('RANK', 0)} of WORLD_SIZE={world}: start the ranks with a launcher"
        )
    if world > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(f"WORLD_SIZE={world} without MASTER_ADDR: start with a launcher")
    return Ranks(number("RANK", 0), world, number("LOCAL_RANK", 0), local_world)


def threads(ranks: Ranks) -> int:
    """This rank's share of the machine's cores, or what OMP_NUM_THREADS says."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // ranks.local_world)


def join(ranks: Ranks, *, deepspeed: bool) -> None:
    """Share the cores among the local ranks, and form the process group where there are peers.

    Args:
        deepspeed: whether DeepSpeed will use the group too.
    """
    import torch

    torch.set_num_threads(threads(ranks))
    if torch.cuda.is_available():
        if ranks.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"{ranks.local_world} ranks on this machine, and {torch.cuda.device_count()} GPUs; "
                f"start at most one rank a GPU, with --num_accelerators"
            )
        torch.cuda.set_device(ranks.local_rank)
    if deepspeed and ranks.world == 1:
        # DeepSpeed forms a group even of one, and looks for a launcher's names.
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**alone, "MASTER_PORT": str(_free_port())}.items():
            os.environ.setdefault(name, value)
    if ranks.world > 1 and not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, rank=ranks.rank, world_size=ranks.world)
        if deepspeed:
            # DeepSpeed keeps a view of its own, and accelerate sets it up only together with the
            # group: without it, ZeRO-3 loads a model as if this rank were alone.
            from deepspeed.comm import init_distributed

            init_distributed(backend, auto_mpi_discovery=False, verbose=False)
            _unlink_buffers(ranks)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _unlink_buffers(ranks: Ranks) -> None:
    """Take the names from the shared memory through which DeepSpeed's ranks on one machine reduce.

    DeepSpeed never does: 66 MiB of memory a rank would stay taken after every run. What all ranks
    have mapped needs no name, and without one it goes when they do, however they end.
    """
    import torch

    torch.distributed.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{ranks.rank}"
    (SHARED_MEMORY / name).unlink(missing_ok=True)


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


def wait_for(*products: Path) -> None:
    """Wait until another rank has made one of these files or folders, by a rename."""
    while not any(product.exists() for product in products):
        time.sleep(POLL_SECONDS)
