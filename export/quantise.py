"""Quantise a graph's weights. Activations stay in fp32, so no row depends on its batch."""

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cai_scale.runtime.bundle import WEIGHTS_SUFFIX

BITS = 8
BLOCK = 32


def quantise(
    graph: Path, target: Path, *, accuracy_level: int = 0, keep: Collection[str] = ()
) -> None:
    """Write `graph` with its matrix products at 8 bits, symmetric, in blocks of 32.

    The product with the vocabulary keeps fp32 where it shares its weights with the embedding.

    Args:
        accuracy_level: of MatMulNBits: 0 multiplies in fp32; 4 rounds each token's activations to
            8 bits too, in blocks of their own, which is faster over many tokens.
        keep: outputs whose product stays in fp32.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    # The weights stay on disk, and the quantiser reads one matrix at a time. It looks for their
    # file in the working folder.
    model = onnx.load(str(graph), load_external_data=False)
    with contextlib.chdir(graph.parent):
        quantizer = MatMulNBitsQuantizer(
            model,
            bits=BITS,
            block_size=BLOCK,
            is_symmetric=True,
            accuracy_level=accuracy_level,
            nodes_to_exclude=[node.name for node in model.graph.node if {*node.output} & {*keep}],
        )
        quantizer.process()
    model = quantizer.model.model
    onnx.load_external_data_for_model(model, str(graph.parent))  # what is left of them
    save(model, target)


def save(model: Any, target: Path) -> None:
    """Write a graph with its weights in a sidecar beside it."""
    import onnx

    sidecar = target.name + WEIGHTS_SUFFIX
    onnx.save(
        model,
        str(target),
        save_as_external_data=True,
        location=sidecar,
        all_tensors_to_one_file=True,
        size_threshold=1024,
    )
    # onnx makes the sidecar readable to its owner alone; the graph beside it is not.
    target.with_name(sidecar).chmod(target.stat().st_mode)
