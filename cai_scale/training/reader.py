"""A model in torch that reads answers somebody gave: see `evaluation.likelihood.Reader`."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cai_scale.records import Message
from cai_scale.training import models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ModelReader:
    """Reads one answer at a time, so that no other changes its numbers, nor padding."""

    def __init__(
        self, model: Any, tokenizer: "PreTrainedTokenizerBase", *, adapted: bool = True
    ) -> None:
        """
        Args:
            adapted: False reads as the base model does, past the adapter of a model with one.
        """
        self._model, self._tokenizer = model, tokenizer
        self._plain = contextlib.nullcontext if adapted else model.disable_adapter

    def read(
        self, messages: Sequence[Message], answer: str
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        prompt = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        room = getattr(self._model.config, "max_position_embeddings", None) or sys.maxsize
        ids = self._tokenizer(answer, add_special_tokens=False)["input_ids"][: room - len(prompt)]
        # The last token foretells none of them.
        tokens = torch.tensor([[*prompt, *ids][:-1]], device=self._model.device)
        with torch.inference_mode(), self._plain():
            logits = self._model(input_ids=tokens, logits_to_keep=len(ids)).logits
        return np.array(ids, np.int64), logits[0, -len(ids) :].float().cpu().numpy()


def readers(
    model: str, product: Path, dtype: torch.dtype, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[ModelReader, ModelReader]:
    """The base model, and what was trained from it: one in memory where that is an adapter."""
    trained = models.load_trained(model, product, dtype)
    if models.is_adapter(product):
        return ModelReader(trained, tokenizer, adapted=False), ModelReader(trained, tokenizer)
    base = models.load_model(model, dtype)
    return ModelReader(base, tokenizer), ModelReader(trained, tokenizer)
