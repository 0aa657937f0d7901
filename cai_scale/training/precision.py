"""Which number format a machine trains in, and why."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cai_scale.errors import ConfigError

if TYPE_CHECKING:
    import torch

NAMES = ("auto", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Precision:
    """A format's name, and where it came from, in words."""

    name: str
    reason: str

    @property
    def dtype(self) -> "torch.dtype":
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.name]


def choose(name: str) -> Precision:
    """Resolve "auto": bf16, else fp16, on GPUs; bf16 on CPUs that compute in it, else fp32.

    Raises:
        ConfigError: the name is unknown, or the hardware lacks the format.
    """
    import torch

    if name not in NAMES:
        raise ConfigError(f"unknown precision {name!r}; choose one of: {', '.join(NAMES)}")
    gpu = torch.cuda.is_available()
    if name == "fp16" and not gpu:
        raise ConfigError("precision 'fp16' needs a GPU; use bf16 or fp32 on a CPU")
    if name != "auto":
        return Precision(name, "as asked")
    if gpu:
        if torch.cuda.is_bf16_supported():
            return Precision("bf16", "the GPU computes in bf16")
        return Precision("fp16", "the GPU lacks bf16")
    # oneDNN emulates bf16 on a CPU without these instructions, and is then slower than fp32.
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return Precision("bf16", "the CPU computes in bf16")
    return Precision("fp32", "the CPU lacks bf16 instructions")
