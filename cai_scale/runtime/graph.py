"""The two graphs of a policy, as onnxruntime sessions on the CPU."""

import contextlib
import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Array = NDArray[Any]

KEPT = "kept_tokens"  # an input of fused graphs: which of the new tokens have logits


def open_session(path: Path, threads: int = 0) -> ort.InferenceSession:
    """A session on the CPU; `threads` 0 takes every core."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def return_free_memory() -> None:
    """Give what loading left free back to the system: with glibc, a sixth of a small model."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


class Graph:
    """The contract graph: tokens and a cache go in, logits and the longer cache come out.

    It is masked and takes `position_ids`, so rows may be padded on either side.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        self.session = open_session(path, threads)
        inputs = self.session.get_inputs()
        # [heads, head size] of each tensor of the cache, by the name of its input
        self.cache_shapes = {
            i.name: (int(i.shape[1]), int(i.shape[3]))
            for i in inputs
            if i.name.startswith("past_key_values.")
        }
        self.output_names = [o.name for o in self.session.get_outputs()]
        self.vocabulary = int(self.session.get_outputs()[0].shape[2])

    def empty_cache(self, rows: int) -> dict[str, Array]:
        """A cache of no tokens: [rows, heads, 0, head size] for each input."""
        return {
            name: np.zeros((rows, heads, 0, size), np.float32)
            for name, (heads, size) in self.cache_shapes.items()
        }

    def run(
        self, input_ids: Array, attention_mask: Array, cache: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """One step.

        Args:
            input_ids: [rows, new tokens], int64.
            attention_mask: [rows, cached + new tokens], int64; 0 marks padding.
            cache: from `empty_cache` or the step before.

        Returns:
            Logits [rows, new tokens, vocabulary] in float32, and the cache with the new tokens.
        """
        positions = np.clip(np.cumsum(attention_mask, axis=1) - 1, 0, None)
        return self._run(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions[:, -input_ids.shape[1] :],
            **cache,
        )

    def read(self, input_ids: Array, attention_mask: Array) -> dict[str, Array]:
        """The cache of rows that have just been read, padded on the right."""
        return self.run(input_ids, attention_mask, self.empty_cache(len(input_ids)))[1]

    def logits(self, tokens: Sequence[int], last: int) -> Array:
        """Of one row without a cache, the logits of its `last` tokens: [last, vocabulary]."""
        ids = np.array([tokens], np.int64)
        return self.run(ids, np.ones_like(ids), self.empty_cache(1))[0][0, -last:]

    def _run(self, **feed: Array) -> tuple[Array, dict[str, Array]]:
        values = self.session.run(self.output_names, feed)
        outputs = dict(zip(self.output_names, values, strict=True))
        logits = outputs.pop("logits")
        return logits, {past_name(name): value for name, value in outputs.items()}


class FusedGraph(Graph):
    """The same model with fused attention, for speed.

    It takes as many of a row's tokens for real as its mask has ones, from the first on: rows may
    be padded on the right alone, and left-padded rows are silently wrong. It can write into a
    cache longer than the tokens so far, in place (see `cache.FusedCache`).
    """

    def run(
        self, input_ids: Array, attention_mask: Array, cache: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        return self._keep(np.arange(input_ids.shape[1]), input_ids, attention_mask, cache)

    def read(self, input_ids: Array, attention_mask: Array) -> dict[str, Array]:
        kept = np.zeros(1, np.int64)  # one token's logits, which nobody reads
        return self._keep(kept, input_ids, attention_mask, self.empty_cache(len(input_ids)))[1]

    def logits(self, tokens: Sequence[int], last: int) -> Array:
        kept, ids = np.arange(len(tokens))[-last:], np.array([tokens], np.int64)
        return self._keep(kept, ids, np.ones_like(ids), self.empty_cache(1))[0][0]

    def _keep(
        self, kept: Array, input_ids: Array, attention_mask: Array, cache: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """One step that forms the logits of the new tokens at the places `kept` alone."""
        return self._run(
            input_ids=input_ids, attention_mask=attention_mask, **{KEPT: kept}, **cache
        )


def pad(
    rows: Sequence[Sequence[int]], *, left: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and their mask, [rows, longest row] each, int64."""
    width = max(map(len, rows))
    tokens, mask = np.zeros((2, len(rows), width), np.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        tokens[index, place], mask[index, place] = row, 1
    return tokens, mask


def past_name(name: str) -> str:
    """The input that takes what the output `present.N.key` gives."""
    return name.replace("present.", "past_key_values.", 1)
