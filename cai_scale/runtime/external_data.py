"""Where an ONNX graph says that its weights lie, read without the onnx package.

onnxruntime follows these paths as soon as a session opens, so they are looked at before. Only
the headers of the protobuf's fields are read; weights inside the file are stepped over.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

# onnx.proto: which fields of which messages lead to a tensor, wherever one may stand. The last
# step, an entry of a tensor's `external_data`, is a key (1) and a value (2).
_FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {
        **{5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
        **{22: "sparse tensor", 23: "sparse tensor"},
    },
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


def locations(path: Path) -> set[str]:
    """The `location` of every tensor of a model that lies in another file, as written there.

    Raises:
        ValueError: the file is no protobuf that a model could be.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return set(_locations(content))


def _locations(content: mmap.mmap) -> Iterator[str]:
    waiting = [("model", 0, len(content))]  # a stack: graphs may stand in graphs to any depth
    while waiting:
        message, start, end = waiting.pop()
        if message == "entry":
            yield from _location(content, start, end)
            continue
        for field, first, last in _fields(content, start, end):
            inner = _FIELDS[message].get(field)
            if inner is not None:
                waiting.append((inner, first, last))


def _location(content: mmap.mmap, start: int, end: int) -> Iterator[str]:
    texts = [(field, content[first:last]) for field, first, last in _fields(content, start, end)]
    if (1, b"location") in texts:
        yield from (text.decode("utf-8") for field, text in texts if field == 2)


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of each field of a message that holds bytes."""
    while start < end:
        tag, start = _varint(content, start, end)
        field, kind = tag >> 3, tag & 7
        if not 0 < field < 1 << 29:  # C++ would drop the bits above
            raise ValueError(f"a field of the number {field}")
        if kind == _VARINT:
            _, start = _varint(content, start, end)
            continue
        if kind == _BYTES:
            size, start = _varint(content, start, end)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            size = 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field of the unknown kind {kind}")
        if start + size > end:
            raise ValueError("a field that ends outside its message")
        if kind == _BYTES:
            yield field, start, start + size
        start += size


def _varint(content: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = 0
    for position in range(start, min(end, start + 10)):
        byte = content[position]
        value |= (byte & 0x7F) << 7 * (position - start)
        if byte < 0x80:
            return value, position + 1
    raise ValueError("a number that does not end")
