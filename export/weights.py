"""Graphs and their weights: one sidecar for all graphs of a variant, each tensor in it once."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cai_scale.runtime.bundle import WEIGHTS_SUFFIX

if TYPE_CHECKING:
    import onnx_ir

INLINE = 1024  # bytes under which a tensor stays in its graph
PAGE = 4096  # where tensors begin, so that readers can map them into memory


def save(models: Mapping[Path, "onnx_ir.Model"]) -> None:
    """Write graphs of one folder; the first one's name is the sidecar's.

    Tensors of equal bytes are written once, whichever graphs they stand in and in whatever shape.
    Afterwards the models read their weights from the sidecar, and hold no memory.
    """
    import onnx_ir

    target = sidecar(next(iter(models)))
    places: dict[str, tuple[int, int]] = {}  # by digest: offset and length
    with target.open("wb") as file:
        for model in models.values():
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < INLINE:
                    continue
                content = tensor.tobytes()
                key = hashlib.sha256(content).hexdigest()
                if key not in places:
                    file.write(bytes(-file.tell() % PAGE))
                    places[key] = file.tell(), len(content)
                    file.write(content)
                offset, length = places[key]
                value.const_value = onnx_ir.ExternalTensor(
                    target.name, offset, length, tensor.dtype,
                    shape=tensor.shape, name=value.name or "", base_dir=str(target.parent),
                )  # fmt: skip
    for path, model in models.items():
        onnx_ir.save(model, str(path))


def sidecar(graph: Path) -> Path:
    """Where the weights of a contract graph lie."""
    return graph.with_name(graph.name + WEIGHTS_SUFFIX)
