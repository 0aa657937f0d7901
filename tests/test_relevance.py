"""The embeddings against transformers' own BERT, at random weights."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from cai_scale.evaluation import relevance
from cai_scale.evaluation.relevance import Embedder, gelu

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "how", "do", "i", "boil", "rice", "water", "?"]
TEXTS = ["how do i boil rice ?", "water", "rice rice rice water how", "i boil water " * 20]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32}))
    return tmp_path


def expected(folder: Path, text: str) -> np.ndarray:
    """One text at a time, by transformers, in fp64."""
    model = BertModel.from_pretrained(folder).eval().double()
    ids = [1, *[WORDS.index(word) for word in text.split()][:30], 2]
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    mean = states.mean(0)
    return (mean / mean.norm()).numpy()


def test_embeddings_are_those_of_transformers(folder: Path) -> None:
    found = Embedder(folder)(TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        assert np.abs(vector - expected(folder, text)).max() < 1e-5


def test_a_weight_that_moved_shows(folder: Path) -> None:
    embedder = Embedder(folder)
    embedder.weights["encoder.layer.1.attention.self.value.weight"][0, 0] += 0.5
    assert np.abs(embedder(TEXTS)[0] - expected(folder, TEXTS[0])).max() > 1e-4


def test_a_text_is_embedded_alike_in_every_company(folder: Path) -> None:
    embedder = Embedder(folder)
    alone = embedder(TEXTS[1:2])
    together = embedder(TEXTS)
    assert np.abs(alone[0] - together[1]).max() < 1e-6


def test_gelu_is_that_of_torch() -> None:
    x = np.linspace(-6, 6, 2001, dtype=np.float32)
    exact = torch.nn.functional.gelu(torch.tensor(x, dtype=torch.float64)).numpy()
    assert np.abs(gelu(x) - exact).max() < 2e-6


def test_relevance_is_the_cosine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relevance, "_folder", lambda: folder)
    found = relevance.relevance(TEXTS[:2], TEXTS[2:])
    for value, one, other in zip(found, TEXTS[:2], TEXTS[2:], strict=True):
        assert value == pytest.approx(expected(folder, one) @ expected(folder, other), abs=1e-5)


def test_the_package_is_found_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relevance, "PACKAGE", "a_package_of_the_tests")
    assert not relevance.available()
    package = tmp_path / "a_package_of_the_tests"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not relevance.available()  # the package is there, its weights are not
    (package / "model" / "model.safetensors").write_bytes(b"")
    assert relevance.available() and "a_package_of_the_tests" not in sys.modules
