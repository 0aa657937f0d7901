"""What the rows of a running batch have read so far, for each kind of graph.

Both kinds hold dense rows 0 … n-1. `prefill` appends rows, `step` feeds one token to each, and
`drop` removes a row by moving the last one into its place.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnxruntime as ort

from cai_scale.runtime.graph import KEPT, Array, FusedGraph, Graph, pad, past_name

PREFILL_TOKENS = 512  # at most, in one run of the graph: it bounds the memory of a run
GROWTH = 64  # tokens by which the room of a fused cache grows


class Cache(Protocol):
    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        """Append a row for each prompt, which may be empty; rows may reach `room` tokens."""
        ...

    def step(self, tokens: Array) -> Array:
        """Feed one token to each row, [rows] int64; return logits [rows, vocabulary]."""
        ...

    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        ...


def open_cache(graph: Graph, rows: int) -> Cache:
    """An empty cache for at most `rows` rows."""
    return FusedCache(graph, rows) if isinstance(graph, FusedGraph) else MaskedCache(graph)


def _prefilled(graph: Graph, prompts: Sequence[Sequence[int]]) -> list[dict[str, Array]]:
    """The cache of each prompt by itself: [heads, tokens, head size] per tensor.

    Equal prompts are read once; the others in batches of similar length, padded on the right.
    """
    found: dict[tuple[int, ...], dict[str, Array]] = {(): {}}
    ordered = sorted({tuple(prompt) for prompt in prompts if prompt}, key=len)
    while ordered:
        rows = max(1, PREFILL_TOKENS // len(ordered[-1]))
        batch, ordered = ordered[-rows:], ordered[:-rows]
        cache = graph.read(*pad(batch))
        for row, prompt in enumerate(batch):
            found[prompt] = {name: value[row, :, : len(prompt)] for name, value in cache.items()}
    return [found[tuple(prompt)] for prompt in prompts]


class FusedCache:
    """Room for every row's tokens, allocated once and written in place by the graph."""

    def __init__(self, graph: FusedGraph, rows: int) -> None:
        self._graph, self._rows = graph, rows
        self._lengths = np.zeros(0, np.int64)
        self._room = 0
        self._tensors: dict[str, Array] = {}
        self._logits = np.empty((rows, 1, graph.vocabulary), np.float32)
        self._binding = graph.session.io_binding()
        self._binding.bind_cpu_input(KEPT, np.zeros(1, np.int64))
        self._bound = (0, 0)

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        self._reserve(room)
        for prompt, cache in zip(prompts, _prefilled(self._graph, prompts), strict=True):
            row = len(self._lengths)
            for name, value in cache.items():
                self._tensors[name][row, :, : len(prompt)] = value
            self._lengths = np.append(self._lengths, len(prompt))

    def step(self, tokens: Array) -> Array:
        rows = len(self._lengths)
        self._bind(rows)
        mask = np.arange(self._lengths.max() + 1) <= self._lengths[:, None]
        self._binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens[:, None]))
        self._binding.bind_cpu_input("attention_mask", mask.astype(np.int64))
        self._graph.session.run_with_iobinding(self._binding)
        self._lengths += 1
        return self._logits[:rows, 0]

    def drop(self, row: int) -> None:
        last = len(self._lengths) - 1
        if row != last:
            length = self._lengths[row] = self._lengths[last]
            for tensor in self._tensors.values():
                tensor[row, :, :length] = tensor[last, :, :length]
        self._lengths = self._lengths[:last]

    def _reserve(self, room: int) -> None:
        if room <= self._room:
            return
        old, self._room = self._room, -(-room // GROWTH) * GROWTH
        for name, (heads, size) in self._graph.cache_shapes.items():
            tensor = np.zeros((self._rows, heads, self._room, size), np.float32)
            if old:
                tensor[:, :, :old] = self._tensors[name]
            self._tensors[name] = tensor

    def _bind(self, rows: int) -> None:
        """Bind the first `rows` rows of every tensor, where that has changed."""
        if self._bound == (rows, self._room):
            return
        self._bound = (rows, self._room)
        for name in self._graph.output_names:
            if name == "logits":
                self._binding.bind_ortvalue_output(name, _shared(self._logits[:rows]))
            else:
                value = _shared(self._tensors[past_name(name)][:rows])
                self._binding.bind_ortvalue_input(past_name(name), value)
                self._binding.bind_ortvalue_output(name, value)


class MaskedCache:
    """Rows aligned at their newest token; each step's cache is a new, longer one."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._tensors = graph.empty_cache(0)
        self._mask = np.zeros((0, 0), np.int64)

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        caches = _prefilled(self._graph, prompts)
        width = max(self._width(), *map(len, prompts))
        self._resize(width)
        masks = np.zeros((len(prompts), width), np.int64)
        for row, prompt in enumerate(prompts):
            masks[row, width - len(prompt) :] = 1
        self._mask = np.concatenate([self._mask, masks])
        for name, tensor in self._tensors.items():
            new = np.zeros((len(prompts), *tensor.shape[1:]), np.float32)
            for row, (prompt, cache) in enumerate(zip(prompts, caches, strict=True)):
                if prompt:
                    new[row, :, width - len(prompt) :] = cache[name]
            self._tensors[name] = np.concatenate([tensor, new])

    def step(self, tokens: Array) -> Array:
        self._mask = np.pad(self._mask, ((0, 0), (0, 1)), constant_values=1)
        logits, self._tensors = self._graph.run(tokens[:, None], self._mask, self._tensors)
        return logits[:, 0]

    def drop(self, row: int) -> None:
        kept = list(range(len(self._mask)))
        kept[row] = kept[-1]
        kept.pop()
        self._mask = self._mask[kept]
        self._tensors = {name: tensor[kept] for name, tensor in self._tensors.items()}
        self._resize(self._width())

    def _width(self) -> int:
        """The columns that some row needs."""
        return int(self._mask.sum(axis=1).max(initial=0))

    def _resize(self, width: int) -> None:
        """Cut columns off on the left, or add masked ones there."""
        more = width - self._mask.shape[1]
        if more <= 0:
            start = self._mask.shape[1] - width
            self._mask = self._mask[:, start:]
            self._tensors = {n: t[:, :, start:] for n, t in self._tensors.items()}
        else:
            self._mask = np.pad(self._mask, ((0, 0), (more, 0)))
            self._tensors = {
                n: np.pad(t, ((0, 0), (0, 0), (more, 0), (0, 0))) for n, t in self._tensors.items()
            }


def _shared(array: Array) -> ort.OrtValue:
    """An OrtValue over the array's own memory."""
    return ort.OrtValue.ortvalue_from_numpy(array)
