"""`python benchmarks/gpu.py [--model FOLDER]`: `training.py`'s table on a GPU, in bf16.

Without a model it takes random weights of a 1B-class Llama: what a step takes does not depend on
what the weights are. Equality after 50 steps is not asked again; the CPU shows it.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import training

from cai_scale.training import models


def random_llama(folder: Path) -> str:
    """1.0 billion weights in bf16, read by the default model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = models.load_tokenizer(training.MODEL)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder, instead of random weights")
    parser.add_argument("--batch", type=int, default=64, help="pairs a step")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "gpu.py measures on a GPU, and torch finds none here\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training.PAIRS = 3 * given.batch
        pairs = training.sample(folder / "pairs.jsonl")
        training.MODEL = given.model or random_llama(folder / "model")
        peak, needed = training.peak(torch.bfloat16, "cuda"), training.operations(pairs)
        found = training.compare(folder, "dpo", "bf16", given.batch)
    share = {name: rates["median"] * needed / peak for name, rates in found["rates"].items()}
    print(
        json.dumps({"gpu": torch.cuda.get_device_name(), "share of peak": share, **found}, indent=1)
    )


if __name__ == "__main__":
    main()
