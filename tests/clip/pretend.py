"""An accelerator that is not there: tensors that say they are elsewhere, compute on the CPU, and count what is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

DEVICE = torch.device("meta")
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
READS |= {aten.nonzero.default, aten.masked_select.default}


class Remote(Tensor):
    """A tensor of the pretended accelerator; `held` is where its values really are."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> Any:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            held.stride(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )

    def __init__(self, held: Tensor, requires_grad: bool = False) -> None:
        self.held = held

    def __repr__(self, **_: Any) -> str:
        return f"Remote{tuple(self.shape)}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Accelerator(TorchDispatchMode):
    """While it is entered, what is made on the pretended device is there, and reads are counted."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        far = any(isinstance(t, Remote) for t in torch.utils._pytree.tree_leaves((args, kwargs)))
        device = kwargs.get("device")
        leaves = far and device is not None and torch.device(device).type == "cpu"
        copies_here = func is aten.copy_.default and far and not isinstance(args[0], Remote)
        self.reads += bool((far and func in READS) or leaves or copies_here)
        return run(func, args, kwargs)


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Carry out one call on the values that are held; refuse to mix devices as an accelerator would."""
    tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    far = any(isinstance(t, Remote) for t in tensors)
    asked = kwargs.get("device")
    there = far if asked is None else torch.device(asked) == DEVICE
    if far and func not in (aten.copy_.default, aten._to_copy.default):
        mixed = [t for t in tensors if not isinstance(t, Remote) and t.ndim > 0]
        if mixed:
            raise RuntimeError(f"{func}: tensors on two devices")
    plain = tree_map_only(Remote, lambda t: t.held, (args, kwargs))
    plain_args, plain_kwargs = plain
    if asked is not None:
        plain_kwargs = {**plain_kwargs, "device": torch.device("cpu")}
    result = func(*plain_args, **plain_kwargs)
    if not there:
        return result
    known = {id(t.held): t for t in tensors if isinstance(t, Remote)}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Remote(value)

    return tree_map(wrapped, result)


def remote(values: Tensor) -> Remote:
    """Return a copy of a tensor on the pretended accelerator."""
    return Remote(values.detach().clone())
