"""Recurrent layers of an ONNX file: onnxruntime computes them in float, so the file holds their weights as int8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from clipquant.export.parts.onnx_weights import keeps_codes
from clipquant.quant.codes.tensor import dequantize
from clipquant.quant.codes.weights import QuantizedWeights

if TYPE_CHECKING:
    import onnx

_KINDS = ("LSTM", "GRU", "RNN")
_WEIGHTS = (1, 2)  # places among a node's inputs: of the input and of the state


def hold_recurrent(data: bytes, weights: QuantizedWeights) -> tuple[bytes, frozenset[str]]:
    """Return a file whose recurrent layers read int8 weights through DequantizeLinear, a scale a row.

    Rows that stand in the artifact, in whatever order, keep its scales and so its codes.

    Args:
        data: The file.
        weights: The artifact's.

    Returns:
        The file, and the keys of the weights whose codes are the artifact's.
    """
    import onnx

    model = onnx.load_from_string(data)
    nodes = [node for node in model.graph.node if node.op_type in _KINDS]
    if not nodes:
        return data, frozenset()
    owners = dict(_rows(weights))
    met: dict[str, int] = {}
    names = dict.fromkeys(node.input[place] for node in nodes for place in _WEIGHTS)
    rebuilt = {name: _hold(model.graph, name, owners, met) for name in names}
    for node in nodes:
        for place in _WEIGHTS:
            if rebuilt[node.input[place]]:
                node.input[place] = f"{node.input[place]}.whole"
    rest = [*model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend([*(one for own in rebuilt.values() for one in own), *rest])
    kept = {key for key, rows in met.items() if rows >= weights.tensors[key].layout.rows}
    return model.SerializeToString(), frozenset(kept)


def _rows(weights: QuantizedWeights) -> Iterator[tuple[bytes, tuple[str, float]]]:
    """Yield each row of the artifact's weights that int8 holds exactly, with its key and its scale."""
    for key, tensor in weights.tensors.items():
        if not keeps_codes(tensor) or len(tensor.layout.shape) != 2:
            continue
        scales = tensor.scale.float().expand(tensor.layout.rows, -1)[:, 0].tolist()
        for row, scale in zip(dequantize(tensor).float().numpy(), scales, strict=True):
            yield row.tobytes(), (key, scale)


def _hold(
    graph: onnx.GraphProto,
    name: str,
    owners: Mapping[bytes, tuple[str, float]],
    met: dict[str, int],
) -> list[onnx.NodeProto]:
    """Put int8 codes in the place of a constant; return the nodes that make NAME.whole of them."""
    from onnx import helper, numpy_helper

    constant = next((i for i in graph.initializer if i.name == name), None)
    if constant is None:
        return []
    array = numpy_helper.to_array(constant)
    rows = array.reshape(-1, array.shape[-1]).astype(np.float32)
    scales = np.abs(rows).max(1, initial=0.0) / 127
    scales[scales == 0] = 1.0
    for index, row in enumerate(rows):
        owner = owners.get(row.tobytes())
        if owner is not None:
            scales[index] = owner[1]
            met[owner[0]] = met.get(owner[0], 0) + 1
    codes = np.rint(rows / scales[:, None]).clip(-127, 127).astype(np.int8)
    parts = {"q": codes, "scale": scales.astype(np.float32), "shape": np.array(array.shape)}
    graph.initializer.extend(
        numpy_helper.from_array(part, f"{name}.{suffix}") for suffix, part in parts.items()
    )
    graph.initializer.remove(constant)
    return [
        helper.make_node("DequantizeLinear", [f"{name}.q", f"{name}.scale"], [f"{name}.rows"], axis=0),
        helper.make_node("Reshape", [f"{name}.rows", f"{name}.shape"], [f"{name}.whole"]),
    ]  # fmt: skip
