"""A model's graphs in several number formats, and which of them are close enough to keep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cai_scale.errors import GateError
from cai_scale.runtime import bundle as layout
from cai_scale.runtime.graph import FusedGraph, Graph

from . import weights
from .parity import MAX_DELTA, Bounds, Figures, Reference, check_exact, measure, outside
from .quantise import quantise

if TYPE_CHECKING:
    import onnx_ir

Models = Mapping[str, "onnx_ir.Model"]  # by kind: "graph" and, where there is one, "fused"

# Bits, and how weights are rounded to them: what kept the most (benchmarks/four_bits.py).
ROUNDING = {"q8": (8, "nearest"), "q4": (4, "offsets")}
SESSIONS = {"graph": Graph, "fused": FusedGraph}


@dataclass(frozen=True)
class Variant:
    """A variant in a bundle's folder: its graphs and, for each, how far it is from the model."""

    name: str
    folder: Path
    files: Mapping[str, str]  # its graphs, by kind
    figures: Mapping[str, Figures]  # likewise

    @property
    def graph(self) -> Path:
        """The contract graph."""
        return self.folder / self.files["graph"]

    @property
    def bytes(self) -> int:
        """Of its graphs and their weights."""
        return sum(path.stat().st_size for path in self._paths())

    def outside(self, bounds: Bounds) -> str | None:
        """Which bound one of its graphs does not keep; None where they keep them all."""
        # Beside a fused graph our runtime does not read the other, and fp16 sums are coarse.
        free = {"graph"} if "fused" in self.files or self.name == "fp16" else set()
        found = [
            outside(figures, bounds, np.inf if kind in free else MAX_DELTA)
            for kind, figures in self.figures.items()
        ]
        return next((figure for figure in found if figure), None)

    def remove(self) -> None:
        for path in self._paths():
            path.unlink()

    def _paths(self) -> list[Path]:
        return [*(self.folder / file for file in self.files.values()), weights.sidecar(self.graph)]


def write(folder: Path, name: str, models: Models) -> dict[str, str]:
    """Write a variant's graphs, their weights in one sidecar; return the files, by kind."""
    files = {kind: file for kind, file in layout.VARIANTS[name].items() if kind in models}
    weights.save({folder / file: models[kind] for kind, file in files.items()})
    return files


def derive(folder: Path, name: str, fp32: Mapping[str, str]) -> dict[str, str]:
    """Write a variant of the fp32 variant, whose files are `fp32`; return its own."""
    import onnx_ir

    if name == "fp16":
        return write(folder, name, {"graph": halve(folder / fp32["graph"])})
    models = [onnx_ir.load(folder / file) for file in fp32.values()]
    bits, method = ROUNDING[name]
    # Activations at 8 bits are much faster. Padding changes a contract graph's sums in their last
    # digits, which then round differently: where our runtime reads that graph, they stay fp32.
    level = 4 if "fused" in fp32 else 0
    quantised = quantise(models, bits, method, accuracy_level=level)
    return write(folder, name, dict(zip(fp32, quantised, strict=True)))


def halve(graph: Path) -> "onnx_ir.Model":
    """A graph in fp16, whose inputs, outputs and cache stay fp32."""
    import onnx
    import onnx_ir
    from onnxruntime.transformers import float16

    model = float16.convert_float_to_float16(
        onnx.load(str(graph)), keep_io_types=True, disable_shape_infer=True
    )
    return onnx_ir.from_proto(model)


def compare(folder: Path, name: str, files: Mapping[str, str], reference: Reference) -> Variant:
    """Measure a variant's graphs.

    Raises:
        GateError: one of fp32 does not answer as the trained model does.
    """
    figures = {kind: measure(SESSIONS[kind](folder / f), reference) for kind, f in files.items()}
    if name == "fp32":
        for kind, found in figures.items():
            check_exact("fp32" if kind == "graph" else "fused fp32", found)
    return Variant(name, folder, files, figures)


def choose(variants: Sequence[Variant], bounds: Bounds) -> tuple[list[Variant], Variant]:
    """The variants inside the bounds, and the smallest of them; the others are removed.

    Raises:
        GateError: none is inside.
    """
    found = {variant.name: variant.outside(bounds) for variant in variants}
    kept = [variant for variant in variants if found[variant.name] is None]
    if not kept:
        figures = "; ".join(f"{name}: {figure}" for name, figure in found.items())
        raise GateError(f"no variant is close enough ({figures}); no bundle was written")
    for variant in variants:
        if variant not in kept:
            print(f"variant {variant.name} is left out: {found[variant.name]}")
            variant.remove()
    return kept, min(kept, key=lambda variant: variant.bytes)
