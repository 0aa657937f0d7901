"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): LoRA on a base model that lies in 4 bits."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from cai_scale.errors import ConfigError, MissingError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def check() -> None:
    """Complain where QLoRA cannot run: it needs bitsandbytes and a GPU.

    Raises:
        MissingError: bitsandbytes is not installed.
        ConfigError: there is no GPU.
    """
    import torch

    if find_spec("bitsandbytes") is None:
        raise MissingError("--qlora needs bitsandbytes, which is not installed; pip install it")
    if not torch.cuda.is_available():
        raise ConfigError("--qlora needs a GPU; leave it out to train LoRA on this machine")


def four_bits() -> "BitsAndBytesConfig":
    """The paper's settings: NF4, double quantisation, products in bf16."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
