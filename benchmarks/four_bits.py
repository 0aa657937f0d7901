"""What each way of rounding to four bits keeps of a model: KL, top-1 agreement, bytes.

The default model's weights have been through four bits once (Q4_1), and a method that finds those
steps again loses next to nothing. So two other models stand beside it: the same one in a rotated
basis, which computes the same function with weights on no such steps, and a small one trained here
from nothing on the bundled prompts.
"""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from cai_export import weights
from cai_export.fuse import fuse
from cai_export.parity import divergence, logits_of
from cai_export.quantise import quantise
from cai_export.rounding import METHODS
from common import MODEL, write

from cai_scale import prompts
from cai_scale.runtime.graph import FusedGraph
from cai_scale.training.logs import quiet
from cai_scale.training.models import load_model, load_tokenizer

TOKENS = 2500
STEPS, ROWS, LENGTH = 400, 16, 64  # of the small model's training


def main() -> None:
    quiet()
    tokenizer = load_tokenizer(MODEL)
    asked = [list(prompt.messages) for prompt in prompts.load(prompts.HELDOUT)]
    read = [tokenizer.apply_chat_template(m, return_dict=True)["input_ids"] for m in asked]
    model = load_model(MODEL, torch.float32).cpu()
    results = {"default": compare(model, read), "rotated": compare(rotated(model), read)}
    small, encode = trained()
    texts = [encode(prompt.text) for prompt in prompts.load(prompts.HELDOUT)]
    write({**results, "fresh": compare(small, texts)})


def compare(model: Any, texts: Sequence[Sequence[int]]) -> dict[str, dict[str, float]]:
    """KL, top-1 agreement and megabytes of the weights, by method."""
    texts = texts[: 1 + int(np.searchsorted(np.cumsum([len(text) for text in texts]), TOKENS))]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        fp32 = Path(folder) / "fp32.onnx"
        fused = fuse(model)
        assert fused is not None
        weights.save({fp32: fused})
        for method in ("8 bits", *METHODS):
            bits, rounding = (8, "nearest") if method == "8 bits" else (4, method)
            path = Path(folder) / f"{method}.onnx"
            weights.save({path: quantise([onnx_ir.load(fp32)], bits, rounding)[0]})
            kl, top1 = distance(FusedGraph(path), model, texts)
            size = weights.sidecar(path).stat().st_size / 1e6
            found[method] = {"kl": kl, "top1": top1, "megabytes": size}
            print(f"{method}: {found[method]}", flush=True)
    return found


def distance(graph: FusedGraph, model: Any, texts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Mean KL in nats a token, and the share of tokens with the same likeliest one."""
    pairs = []
    for text in texts:
        ids = np.array([text])
        logits, _ = graph.run(ids, np.ones_like(ids), graph.empty_cache(1))
        pairs.append(divergence(logits_of(model, text), logits[0]))
    return tuple(float(np.concatenate(values).mean()) for values in zip(*pairs, strict=True))


def rotated(model: Any) -> Any:
    """The same function of a Llama with its residual stream in a random orthogonal basis.

    A norm's weights go into the matrices that read it, so that it commutes with the rotation.
    """
    turned = copy.deepcopy(model)
    turned.config.tie_word_embeddings = False
    size = turned.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]

    def reads(matrix: Any, norm: Any) -> None:
        product = (matrix.weight.double() * norm.weight.double()) @ basis
        matrix.weight = torch.nn.Parameter(product.float(), requires_grad=False)

    def writes(matrix: Any) -> None:
        matrix.weight.copy_(basis.T @ matrix.weight.double())

    with torch.no_grad():
        reads(turned.lm_head, turned.model.norm)
        embedding = turned.model.embed_tokens
        embedding.weight = torch.nn.Parameter((embedding.weight.double() @ basis).float())
        for layer in turned.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for matrix in (attention.q_proj, attention.k_proj, attention.v_proj):
                reads(matrix, layer.input_layernorm)
            for matrix in (mlp.gate_proj, mlp.up_proj):
                reads(matrix, layer.post_attention_layernorm)
            for matrix in (attention.o_proj, mlp.down_proj):
                writes(matrix)
        for name, parameter in turned.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
    return turned


def trained() -> tuple[Any, Any]:
    """A Llama of 6 layers and a tokenizer of 2,000 tokens, made from the bundled prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = [prompt.text for prompt in prompts.load(prompts.TRAIN)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, show_progress=False, special_tokens=["<end>"]
    )
    tokenizer.train_from_iterator(texts, trainer)
    stream = torch.tensor(tokenizer.encode("<end>".join(texts)).ids)
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    size = tokenizer.get_vocab_size()
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=size, tie_word_embeddings=True, **shape, **heads)
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        starts = torch.randint(len(stream) - LENGTH, (ROWS,))
        batch = torch.stack([stream[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval(), lambda text: tokenizer.encode(text).ids


if __name__ == "__main__":
    main()
