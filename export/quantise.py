"""Graphs with their weights at few bits: the products of matrices and the embedding."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .rounding import BLOCK, Array, copies, quantise_matrix

if TYPE_CHECKING:
    import onnx_ir

HEAD_BITS = 8  # the head chooses the token, and the embedding is often the same matrix
LEVELS = 63  # of a part of an activation, on either side of its zero
DOMAIN = "com.microsoft"
# What products of one input share, made at the first of them.
Prepared = dict["onnx_ir.Value | None", list["onnx_ir.Value"]]


def quantise(
    models: Sequence["onnx_ir.Model"],
    bits: int,
    method: str = "nearest",
    *,
    accuracy_level: int = 4,
) -> list["onnx_ir.Model"]:
    """Quantised copies of graphs of one model; a matrix that they share is rounded once.

    Args:
        bits: 4 or 8; the head and the embedding take 8, rounded to nearest.
        method: one of `rounding.METHODS`.
        accuracy_level: of the products: 4 rounds each row's activations to 8 bits, in blocks; 0
            keeps them. By the method "columns", products are in integers; see `_split`.
    """
    quantiser = _Quantiser(bits, method, accuracy_level)
    return [quantiser.copy(model) for model in models]


class _Quantiser:
    def __init__(self, bits: int, method: str, accuracy_level: int) -> None:
        self.bits, self.method, self.accuracy_level = bits, method, accuracy_level
        self._done: dict[tuple[str, bool, int, str], list[Array]] = {}

    def copy(self, model: "onnx_ir.Model") -> "onnx_ir.Model":
        from onnx_ir.convenience import replace_nodes_and_values
        from onnx_ir.passes import common

        copied = model.clone()
        graph = copied.graph
        prepared: Prepared = {}
        graph.opset_imports[DOMAIN] = 1
        for node in list(graph):
            new = None
            if node.op_type == "MatMul":
                new = self._product(graph, node, prepared)
            elif node.op_type == "Gather" and node.inputs[1] in graph.inputs:
                new = self._lookup(graph, node)
            if new is not None:
                replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)
        common.RemoveUnusedNodesPass()(copied)
        return copied

    def _product(
        self,
        graph: "onnx_ir.Graph",
        node: "onnx_ir.Node",
        prepared: Prepared,
    ) -> "onnx_ir.Node | None":
        """x·W of a constant W, which may stand transposed in the graph."""
        weight, transposed = _constant(node.inputs[1])
        if weight is None:
            return None
        head = node.outputs[0].name == "logits"
        if self.method == "columns":
            return None if head else self._integer_product(graph, node, prepared)
        bits, method = (HEAD_BITS, "nearest") if head else (self.bits, self.method)
        rows, columns = reversed(_shape(weight)) if transposed else _shape(weight)
        left = node.inputs[0]
        if method == "offsets" and (left is None or left.shape is None or rows % BLOCK):
            method = "nearest-asymmetric"
        arrays = self._quantised(weight, transposed, bits, method)
        if method == "offsets":
            if left not in prepared:
                prepared[left] = [_with_sums(graph, node, rows // BLOCK)]
            (left,) = prepared[left]
            rows += copies(rows // BLOCK) * (rows // BLOCK)
        settings = {"K": rows, "N": columns, "bits": bits, "block_size": BLOCK}
        settings["accuracy_level"] = self.accuracy_level
        inputs = [left, *_initialise(graph, weight, arrays)]
        return _node("MatMulNBits", inputs, settings, node.name)

    def _integer_product(
        self, graph: "onnx_ir.Graph", node: "onnx_ir.Node", prepared: Prepared
    ) -> "onnx_ir.Node":
        """x·W as the sum of two products in integers: the parts of x, by W rounded by columns."""
        import onnx_ir

        weight, transposed = _constant(node.inputs[1])
        assert weight is not None
        arrays = self._quantised(weight, transposed, 8, "columns")
        columns, scales = _initialise(graph, weight, arrays, "columns")
        left = node.inputs[0]
        if left not in prepared:
            prepared[left] = _split(graph, node)
        largest, zero, *parts = prepared[left]
        products = [
            _node(
                "MatMulIntegerToFloat", [part, columns, step, scales, zero], {}, f"{node.name}/{i}"
            )
            for i, (part, step) in enumerate(zip(parts[::2], parts[1::2], strict=True))
        ]
        total = onnx_ir.node("Add", [product.outputs[0] for product in products])
        total.name = f"{node.name}/total"
        graph.insert_before(node, [*products, total])
        return onnx_ir.node("Mul", [total.outputs[0], largest], name=node.name)

    def _lookup(self, graph: "onnx_ir.Graph", node: "onnx_ir.Node") -> "onnx_ir.Node | None":
        """A token's row of a constant embedding: the head's blocks where it is tied."""
        weight, transposed = _constant(node.inputs[0])
        if weight is None or transposed or _shape(weight)[1] % BLOCK:
            return None
        packed, scales = self._quantised(weight, True, HEAD_BITS, "nearest")
        arrays = [packed.reshape(_shape(weight)), scales]
        rows, steps = _initialise(graph, weight, arrays, "rows")
        settings = {"bits": HEAD_BITS, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        return _node("GatherBlockQuantized", [rows, node.inputs[1], steps], settings, node.name)

    def _quantised(
        self, weight: "onnx_ir.Value", transposed: bool, bits: int, method: str
    ) -> list[Array]:
        import onnx_ir

        tensor = weight.const_value
        array = np.asarray(tensor)
        key = hashlib.sha256(array.tobytes()).hexdigest(), transposed, bits, method
        if key not in self._done:
            self._done[key] = quantise_matrix(array.T if transposed else array, bits, method)
        del array
        if isinstance(tensor, onnx_ir.ExternalTensor):
            tensor.release()  # its file, mapped into memory
        return self._done[key]


def _constant(value: "onnx_ir.Value | None") -> "tuple[onnx_ir.Value | None, bool]":
    """The constant matrix that a value is, and whether it is that matrix transposed."""
    if value is None:
        return None, False
    producer = value.producer()
    transposed = producer is not None and producer.op_type == "Transpose"
    source = producer.inputs[0] if producer is not None and transposed else value
    if source is None or not source.is_initializer() or source.const_value is None:
        return None, False
    return (source, transposed) if len(source.const_value.shape) == 2 else (None, False)


def _shape(weight: "onnx_ir.Value") -> tuple[int, int]:
    rows, columns = weight.const_value.shape
    return int(rows), int(columns)


def _with_sums(graph: "onnx_ir.Graph", product: "onnx_ir.Node", blocks: int) -> "onnx_ir.Value":
    """A product's input, followed by the sums of its blocks as the method "offsets" wants them."""
    import onnx_ir

    left = product.inputs[0]
    assert left is not None and left.shape is not None
    shape = [*[0] * (len(left.shape) - 1), blocks, BLOCK]
    into, axis = (
        _constant_of(graph, name, np.array(values, np.int64))
        for name, values in ((f"blocks_{shape}", shape), ("last_axis", [-1]))
    )
    name = f"{left.name}/blocks"
    split = onnx_ir.node("Reshape", [left, into], name=name)
    total = onnx_ir.node("ReduceSum", [*split.outputs, axis], {"keepdims": 0}, name=f"{name}/sums")
    parts = [left, *list(total.outputs) * copies(blocks)]
    joined = onnx_ir.node("Concat", parts, {"axis": -1}, name=f"{name}/joined")
    graph.insert_before(product, [split, total, joined])
    return joined.outputs[0]


def _split(graph: "onnx_ir.Graph", product: "onnx_ir.Node") -> "list[onnx_ir.Value]":
    """A product's input as its rows' largest values × two parts of 7 bits, a high and a low one.

    One part alone loses more than weights of 8 bits do: a token's activations differ too much in
    size. Parts of 8 bits would overflow on processors that add products in 16 bits.

    Returns:
        The largest values, the zero point of the parts, and each part with its step.
    """
    import onnx_ir

    left = product.inputs[0]
    nodes: list[onnx_ir.Node] = []

    def add(kind: str, *inputs: "onnx_ir.Value | None", **settings: int) -> "onnx_ir.Value":
        name = f"{product.name}/split/{kind}_{len(nodes)}"
        nodes.append(onnx_ir.node(kind, inputs, settings, name=name))
        return nodes[-1].outputs[0]

    high_step = _constant_of(graph, "high_step", np.array(1 / LEVELS, np.float32))
    low_step = _constant_of(graph, "low_step", np.array(0.5 / LEVELS**2, np.float32))
    zero = _constant_of(graph, "part_zero", np.array(LEVELS + 1, np.uint8))
    axis = _constant_of(graph, "last_axis", np.array([-1], np.int64))
    tiny = _constant_of(graph, "smallest_scale", np.array(np.finfo(np.float32).tiny, np.float32))
    largest = add("Max", add("ReduceMax", add("Abs", left), axis, keepdims=1), tiny)
    scaled = add("Div", left, largest)
    high = add("QuantizeLinear", scaled, high_step, zero)
    rest = add("Sub", scaled, add("DequantizeLinear", high, high_step, zero))
    low = add("QuantizeLinear", rest, low_step, zero)
    graph.insert_before(product, nodes)
    return [largest, zero, high, high_step, low, low_step]


def _constant_of(graph: "onnx_ir.Graph", name: str, array: Array) -> "onnx_ir.Value":
    """A constant of the graph; the one of that name, if it has it already."""
    import onnx_ir

    if name not in graph.initializers:
        tensor = onnx_ir.Tensor(array, name=name)
        value = onnx_ir.Value(
            name=name,
            shape=tensor.shape,
            type=onnx_ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(value)
    return graph.initializers[name]


def _initialise(
    graph: "onnx_ir.Graph", weight: "onnx_ir.Value", arrays: Sequence[Array], form: str = "blocks"
) -> list["onnx_ir.Value"]:
    """The arrays as constants of the graph, named after the weight."""
    roles = (form, "scales", "zero_points")
    return [
        _constant_of(graph, f"{weight.name}.{role}", array)
        for role, array in zip(roles, arrays, strict=False)
    ]


def _node(
    kind: str, inputs: Sequence["onnx_ir.Value | None"], settings: dict[str, Any], name: str | None
) -> "onnx_ir.Node":
    import onnx_ir

    return onnx_ir.node(kind, inputs, settings, domain=DOMAIN, name=name)
