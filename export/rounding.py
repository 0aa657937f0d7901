"""Round one matrix to few bits, in blocks of 32 weights that share a scale."""

import contextlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 32
COLUMNS = 512  # rounded at once, so that they stay in the processor's cache
METHODS = ("nearest", "nearest-asymmetric", "k-quant", "hqq", "offsets")


# The library packs the zero points of k-quant wrongly for an odd number of blocks in a row.
PAIR = 2 * BLOCK


def quantise_matrix(weight: Array, bits: int, method: str) -> list[Array]:
    """Round a [in, out] matrix in blocks along its first axis.

    Args:
        weight: float32.
        bits: 4 or 8.
        method: of `METHODS`, where "offsets" is for 4 bits and whole blocks; or "columns", for 8
            bits, which has a scale a column instead of blocks.

    Returns:
        What MatMulNBits takes beside its input: weights [out, blocks, bytes of a block], scales
        [out, blocks] and, by the methods that are not symmetric, zero points [out, …]. By
        "offsets" they are for an input that is followed by `copies` times the sums of its blocks.
        By "columns": int8 weights [in, out] and scales [out], for products in integers.
    """
    if method == "columns":
        return _by_columns(weight)
    if method == "offsets":
        return _with_offsets(*quantise_matrix(weight, bits, "hqq"))
    rows, columns = weight.shape
    padding = ((0, -rows % PAIR), (0, 0))
    parts = [
        _quantise_columns(np.pad(weight[:, start : start + COLUMNS], padding), bits, method)
        for start in range(0, columns, COLUMNS)
    ]
    packed, scales, *zeros = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    blocks = -(-rows // BLOCK)
    arrays = [packed[:, :blocks], scales[:, :blocks]]
    for zero in zeros:  # of 4 bits, two in a byte; hqq has them in float32
        halved = bits == 4 and zero.dtype == np.uint8
        arrays.append(zero[:, : -(-blocks // 2) if halved else blocks])
    return [np.ascontiguousarray(array) for array in arrays]


def copies(blocks: int) -> int:
    """How often the sums of an input's blocks follow it, for the method "offsets": once, until a
    block is full, and once more."""
    return 2 + -(-(-blocks % BLOCK) // blocks)


def _by_columns(weight: Array) -> list[Array]:
    scales = np.abs(weight).max(0) / np.float32(127)
    scales[scales == 0] = 1
    return [np.round(weight / scales).astype(np.int8), scales]


def _with_offsets(packed: Array, scales: Array, zeros: Array) -> list[Array]:
    """Zero points that are no whole numbers, without the slow kernel that takes them.

    A weight is s·(q − z) = s·(q − 8) + o, with one offset o = s·(8 − z) a block. So the offsets
    are the weights of the sums of the input's blocks, and are rounded like other weights: first
    they, and then, in blocks of their own, what rounding left of them.
    """
    offsets = (scales * (8 - zeros)).T
    blocks = len(offsets)
    rows = np.zeros((copies(blocks) * blocks, len(packed)), np.float32)
    rows[:blocks] = offsets
    nibbles, steps = quantise_matrix(rows, 4, "nearest")
    values = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(*nibbles.shape[:2], BLOCK)
    rounded = (values.astype(np.float32) - 8) * steps[:, :, None]
    rows[-blocks:] = offsets - rounded.reshape(len(packed), -1).T[:blocks]
    nibbles, steps = quantise_matrix(rows, 4, "nearest")
    return [np.concatenate([packed, nibbles], 1), np.concatenate([scales, steps], 1)]


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
    # k-quant prints its progress, and divides by zero where a block is constant.
    with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
        quantizer.process()
    found = quantizer.model.model.graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.initializer}
    packed, scales, *zeros = (tensors[name] for name in found.node[0].input[1:])
    return [packed, scales.reshape(columns, -1), *(zero.reshape(columns, -1) for zero in zeros)]
