"""Tiny random models, built in code: a byte-level tokenizer and two layers."""

from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LAYERS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def tiny_tokenizer() -> Any:
    """Bytes and a few merges, trained on the bundled prompts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from cai_scale import prompts

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([p.text for p in prompts.load(prompts.TRAIN)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def save_tiny_llama(folder: Path, *, seed: int = 0, template: bool = True) -> Path:
    """A Llama of two layers with grouped heads and tied embeddings, as a model folder."""
    from transformers import LlamaConfig

    return _save(folder, LlamaConfig, LAYERS, seed=seed, template=template)


def save_tiny_gpt2(folder: Path, *, seed: int = 0) -> Path:
    """A GPT-2: learned positions, Conv1D weights, a tied head, no chat template."""
    from transformers import GPT2Config

    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}
    return _save(folder, GPT2Config, shape, seed=seed, template=False)


def save_tiny_qwen(folder: Path, *, version: int = 3, seed: int = 0) -> Path:
    """Qwen2 (biases, a head of its own) or Qwen3 (normalised queries and keys)."""
    from transformers import Qwen2Config, Qwen3Config

    if version == 2:
        return _save(folder, Qwen2Config, LAYERS | {"tie_word_embeddings": False}, seed=seed)
    return _save(folder, Qwen3Config, LAYERS | {"head_dim": 32}, seed=seed)


def save_tiny_gemma(folder: Path, *, version: int = 3, seed: int = 0) -> Path:
    """Gemma 2 (capped logits) or 3: every other layer sees a window of 12 tokens."""
    from transformers import Gemma2Config, Gemma3TextConfig

    shape = LAYERS | {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return _save(folder, Gemma2Config if version == 2 else Gemma3TextConfig, shape, seed=seed)


def _save(folder: Path, config: Any, shape: Any, *, seed: int, template: bool = True) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    if not template:
        tokenizer.chat_template = None
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.15,  # wide, so that a random model has clear preferences
            **shape,
        )
    )
    with torch.no_grad():  # transformers starts them at zero, and a zero bias is optimised away
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_constitution(path: Path) -> Path:
    """The default constitution with terms that a random model says: letters and signs."""
    import yaml

    from cai_scale import constitution

    data = dict(constitution.load().data)
    for principle, terms in zip(
        data["principles"], (["x", "j"], ["a", "c", "n"], ["e", "o"], ["t", "h"]), strict=True
    ):
        first, *others = principle["lexicon"]["lists"]
        first["terms"] = {"en": terms, "vi": terms}
        for index, other in enumerate(others):
            other["terms"] = {language: [f"{language}zz{index}"] for language in ("en", "vi")}
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    return path


def save_tiny_scorer(folder: Path, labels: tuple[str, ...], *, kind: str = "llama") -> Path:
    """A Llama or GPT-2 of two layers with a score head, its pad token the end of a message."""
    import torch
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        LlamaConfig,
        LlamaForSequenceClassification,
    )

    tokenizer = tiny_tokenizer()
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.15,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    torch.manual_seed(0)
    model: Any
    if kind == "gpt2":
        config = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=1024, **common)
        model = GPT2ForSequenceClassification(config)
    else:
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(max_position_embeddings=1024, **shape, **heads, **common)
        model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
