"""Give a traced graph the names and axes that readers of ONNX models expect."""

import re
from typing import TYPE_CHECKING

from cai_scale.errors import GateError

if TYPE_CHECKING:
    import onnx_ir

_CACHE = re.compile(r"(input|output)\.past_key_values\.layers\.(\d+)\.(keys|values)")
_AXES = {
    "input_ids": ("batch_size", "sequence_length"),
    "attention_mask": ("batch_size", "total_sequence_length"),
    "position_ids": ("batch_size", "sequence_length"),
    "logits": ("batch_size", "sequence_length", None),
    "past_key_values": ("batch_size", None, "past_sequence_length", None),
    "present": ("batch_size", None, "total_sequence_length", None),
}


def normalise(model: "onnx_ir.Model") -> "onnx_ir.Model":
    """Rename in place: `past_key_values.N.key` in, `present.N.key` out, axes by their role.

    Raises:
        GateError: the traced graph has an input or output that has no place in the contract.
    """
    import onnx_ir

    for value in [*model.graph.inputs, *model.graph.outputs]:
        name = value.name or ""
        found = _CACHE.fullmatch(name)
        if found:
            side = "past_key_values" if found[1] == "input" else "present"
            value.name = f"{side}.{found[2]}.{found[3].removesuffix('s')}"
        role = (value.name or "").split(".")[0]
        if role not in _AXES or value.shape is None:
            raise GateError(f"the traced graph has {name!r}, which the bundle's contract lacks")
        # An axis without a symbol keeps its number: heads, head size, vocabulary.
        axes = zip(_AXES[role], value.shape, strict=True)
        value.shape = onnx_ir.Shape([dim if axis is None else axis for axis, dim in axes])
    forget_symbols(model)
    split_gemms(model)
    return model


def split_gemms(model: "onnx_ir.Model") -> None:
    """x·W + b as two nodes: GPT-2's layers come as Gemm, which the quantiser does not know.

    onnxruntime joins them again where nothing was quantised.
    """
    import onnx_ir
    from onnx_ir.convenience import replace_nodes_and_values

    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    for gemm in [node for node in model.graph if node.op_type == "Gemm"]:
        if any(attribute.value != plain[name] for name, attribute in gemm.attributes.items()):
            continue
        left, right, *bias = gemm.inputs
        nodes = [onnx_ir.node("MatMul", [left, right], name=gemm.name)]
        if bias:
            nodes.append(onnx_ir.node("Add", [*nodes[0].outputs, *bias], name=f"{gemm.name}_bias"))
        replace_nodes_and_values(model.graph, gemm, [gemm], nodes, gemm.outputs, nodes[-1].outputs)


def forget_symbols(model: "onnx_ir.Model") -> None:
    """Drop the tracer's symbols from the values inside, so that no reader meets two names for
    one axis; numbers stay."""
    import onnx_ir

    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None and not value.is_graph_output():
                value.shape = onnx_ir.Shape(
                    [dim if isinstance(dim, int) else None for dim in value.shape]
                )
