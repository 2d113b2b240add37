"""ONNX files in onnxruntime: a session that suits the file, its inputs, its outputs in the model's form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from clipquant.export.example import Example, ExportError
from clipquant.export.parts.format import Calls
from clipquant.export.parts.subject import Forward

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

_LENGTH = 32  # of a size beside the batch that a file leaves open
_KINDS: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def open_any(file: bytes | str | Path, threads: int | None = None) -> ort.InferenceSession:
    """Return an onnxruntime session that suits a file.

    Where a file quantizes activations it computes in int8. Else its integer weights are turned into
    floats once, when it is opened.

    Args:
        file: The file's bytes or name.
        threads: Threads of one operator; None: onnxruntime's choice.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    if not any(node.op_type == "QuantizeLinear" for node in _graph(file).node):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    source = file if isinstance(file, bytes) else str(file)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _graph(file: bytes | str | Path) -> onnx.GraphProto:
    import onnx

    model = onnx.load_from_string(file) if isinstance(file, bytes) else onnx.load(file)
    return model.graph


def open_calls(path: str | Path, threads: int | None = None) -> Calls:
    """Return what runs a file on zeros of a batch size, and of 32 along whatever else it leaves open.

    Args:
        path: Name of the file.
        threads: Threads of one operator.
    """
    session = open_any(path, threads)

    def make(batch: int) -> Callable[[], Any] | None:
        fed = {}
        for given in session.get_inputs():
            first, *rest = given.shape or [None]
            if isinstance(first, int) and first != batch:
                return None
            rest = [size if isinstance(size, int) else _LENGTH for size in rest]
            shape = [batch, *rest] if given.shape else []
            fed[given.name] = np.zeros(shape, _KINDS[given.type])
        return partial(session.run, None, fed)

    return make


def feeds(session: ort.InferenceSession, example: Example) -> dict[str, np.ndarray]:
    """Return a call's tensors under the names of a session's inputs, in their order and the file's precision.

    Raises:
        ExportError: If the call has more or fewer tensors than the file has inputs.
    """
    given = session.get_inputs()
    arrays = [_array(tensor) for tensor in example.tensors]
    if len(arrays) != len(given):
        raise ExportError(
            f"the file takes {len(given)} inputs ({', '.join(i.name for i in given)}); the call gives {len(arrays)} "
            "tensors. Call it with the tensors that it was exported with."
        )
    return {
        i.name: a.astype(_KINDS.get(i.type, a.dtype)) if a.dtype.kind == "f" else a
        for i, a in zip(given, arrays, strict=True)
    }


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def runner(session: ort.InferenceSession, outputs: Any) -> Forward:
    """Return a function that stands for a model's forward, run by a session.

    Args:
        session: Of the exported model.
        outputs: Outputs of the model, whose structure is given back.
    """
    leaves, structure = pytree.tree_flatten(outputs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = Example(args, kwargs)
        device = call.tensors[0].device
        given = iter(session.run(None, feeds(session, call)))
        filled = [
            torch.from_numpy(next(given)).to(device) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ]
        return pytree.tree_unflatten(filled, structure)

    return forward
