"""Round one matrix to few bits, in blocks of 32 weights that share a scale."""

import contextlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 32
COLUMNS = 512  # rounded at once, so that they stay in the processor's cache
METHODS = ("nearest", "nearest-asymmetric", "k-quant", "hqq")


def quantise_matrix(weight: Array, bits: int, method: str) -> list[Array]:
    """Round a [in, out] matrix in blocks along its first axis.

    Args:
        weight: float32.
        bits: 4 or 8.
        method: of `METHODS`.

    Returns:
        What MatMulNBits takes beside its input: weights [out, blocks, bytes of a block], scales
        [out, blocks] and, by the methods that are not symmetric, zero points [out, …].
    """
    parts = [
        _quantise_columns(np.ascontiguousarray(weight[:, start : start + COLUMNS]), bits, method)
        for start in range(0, weight.shape[1], COLUMNS)
    ]
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def _quantise_columns(weight: Array, bits: int, method: str) -> list[Array]:
    """What onnxruntime's quantiser makes of a model that is one product."""
    import onnx
    from onnx import helper, numpy_helper
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    rows, columns = weight.shape
    product = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
            "product",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, rows])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, columns])],
            [numpy_helper.from_array(weight, "w")],
        )
    )
    settings: dict[str, Any] = {"bits": bits, "block_size": BLOCK}
    if method == "k-quant":
        shape = {"bits": bits, "group_size": BLOCK, "scheme": "asym"}
        settings["algo_config"] = library.KQuantWeightOnlyQuantConfig(
            customized_weight_config={"product": shape}
        )
    elif method == "hqq":
        settings["algo_config"] = library.HQQWeightOnlyQuantConfig(BLOCK, bits)
    else:
        settings["is_symmetric"] = method == "nearest"
    quantizer = library.MatMulNBitsQuantizer(product, **settings)
    with contextlib.redirect_stdout(io.StringIO()):  # k-quant prints its progress
        quantizer.process()
    found = quantizer.model.model.graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.initializer}
    packed, scales, *zeros = (tensors[name] for name in found.node[0].input[1:])
    return [packed, scales.reshape(columns, -1), *(zero.reshape(columns, -1) for zero in zeros)]
