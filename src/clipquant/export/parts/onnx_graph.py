"""A captured model as an ONNX graph: what torch's exporter writes, named, without traces of this machine."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from clipquant.export.example import ExportError
from clipquant.export.parts.capture import Capture, quiet
from clipquant.export.parts.needs import require
from clipquant.quant.codes.weights import QuantizedWeights

if TYPE_CHECKING:
    import onnx_ir as ir

BASE_OPSET = 20
PACKAGES = ("onnx", "onnxruntime", "onnxscript", "onnx_ir")
EXTRA = "onnx"


def require_onnx() -> None:
    """Raise unless everything that an ONNX export takes is installed.

    Raises:
        ImportError: Naming what is missing and the extra that brings it.
    """
    require("export to ONNX", PACKAGES, EXTRA)


def dequantized_copy(model: nn.Module, weights: QuantizedWeights) -> nn.Module:
    """Return a copy of `model` in eval mode that holds the dequantized weights."""
    copied = copy.deepcopy(model).eval()
    copied.load_state_dict(weights.state_dict(), strict=False)  # a state may hold more than tensors
    return copied


def output_names(outputs: Any) -> list[str]:
    """Return a name for each tensor of a model's outputs, from its keys or place.

    >>> output_names(torch.ones(1)), output_names({"logits": torch.ones(1)})
    (['output'], ['logits'])
    """
    leaves, _ = pytree.tree_flatten_with_path(outputs)
    paths = [path for path, leaf in leaves if isinstance(leaf, Tensor)]
    if len(paths) == 1 and not paths[0]:
        return ["output"]
    steps = [[str(getattr(k, "key", getattr(k, "idx", k))) for k in path] for path in paths]
    return ["_".join(s if not s[0].isdigit() else ["output", *s]) for s in steps]


def to_ir(captured: Capture, opset: int, names: list[str]) -> ir.Model:
    """Return a captured model as torch's exporter writes it, nothing folded."""
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            captured.program,
            (),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            output_names=names,
        )
    if program is None:
        raise ExportError("torch's exporter gave no model.")
    return program.model


def name_sizes(graph: ir.Graph) -> None:
    """Call open sizes `batch`, `length`, `length_2` instead of by the numbers that the exporter gives them."""
    import onnx_ir as ir

    shapes = [v.shape for v in graph.inputs if v.shape is not None and len(v.shape)]
    firsts = [s[0].value for s in shapes if isinstance(s[0], ir.SymbolicDim)]
    symbols = [str(size.value) for s in shapes for size in s if isinstance(size, ir.SymbolicDim)]
    names = {str(firsts[0]): "batch"} if firsts else {}
    for symbol in symbols:
        if symbol.isidentifier() and symbol not in names:
            count = len(names) - ("batch" in names.values()) + 1
            names[symbol] = "length" if count == 1 else f"length_{count}"
    produced = (value for node in graph.all_nodes() for value in node.outputs)
    for value in [*graph.inputs, *produced]:
        if value.shape is not None:  # shapes may be shared and frozen: each value gets its own
            value.shape = ir.Shape([_named(size, names) for size in value.shape])


def _named(size: Any, names: Mapping[str, str]) -> int | str | None:
    """Return a size, each symbol in it by its name."""
    if isinstance(size, int):
        return size
    symbol = getattr(size, "value", size)
    if symbol is None or str(symbol).isdigit():
        return None if symbol is None else int(symbol)
    return re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), str(symbol))


def tensors_only(model: nn.Module, outputs: Any) -> nn.Module:
    """Return a model whose forward gives the tensors among its outputs alone; the model, where it does.

    Args:
        model: Changed in place where its outputs hold anything else, such as a plain number.
        outputs: Its outputs.
    """
    if all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(outputs)):
        return model
    forward = model.forward

    @functools.wraps(forward)
    def tensors(*args: Any, **kwargs: Any) -> list[Tensor]:
        return [t for t in pytree.tree_leaves(forward(*args, **kwargs)) if isinstance(t, Tensor)]

    model.forward = tensors
    return model


def strip_debug_info(model: ir.Model) -> None:
    """Take out the source lines and paths that the exporter leaves for those who debug it."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
