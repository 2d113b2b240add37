"""Where a model is run and what is computed of it: batches moved there, the CPU where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from clipquant.errors import ArgumentError
from clipquant.quant.network.calibration import Loop, Visit

RAN_OUT = "memory of {device} ran out: computed on the CPU"

_Made = TypeVar("_Made")


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's first tensor lies; the CPU for one without any.

    >>> device_of(nn.Linear(1, 1)), device_of(nn.ReLU())
    (device(type='cpu'), device(type='cpu'))
    """
    tensor = next(iter(model.parameters()), next(iter(model.buffers()), None))
    return torch.device("cpu") if tensor is None else tensor.device


def asked_device(device: torch.device | str | int | None) -> torch.device | None:
    """Return a device that was asked for.

    Raises:
        ValueError: If there is none of that name, or it holds no values.

    >>> asked_device("cpu"), asked_device(None)
    (device(type='cpu'), None)
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ArgumentError(
            f"device must be one that torch can compute on; got {device!r} ({said}). Pass 'cpu', or leave "
            "device out to compute where the model lies."
        ) from error
    if found.type == "meta":
        raise ArgumentError(
            "device must hold values; got 'meta'. Pass 'cpu' or an accelerator's name, or leave device out."
        )
    return found


def moved(value: Any, device: torch.device) -> Any:
    """Return any nesting of values, dataclasses among them, with its tensors on a device.

    >>> moved({"x": (torch.ones(1), 2)}, torch.device("cpu"))
    {'x': (tensor([1.]), 2)}
    """

    def move(leaf: Any) -> Any:
        if is_dataclass(leaf) and not isinstance(leaf, type):
            held = {f.name: getattr(leaf, f.name) for f in fields(leaf)}
            return replace(leaf, **{key: moved(part, device) for key, part in held.items()})
        if isinstance(leaf, PackedSequence):
            packed: Any = leaf  # its own `to` knows which of its tensors stay
            return packed.to(device)
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    return tree_map(move, value, is_leaf=lambda leaf: isinstance(leaf, PackedSequence))


def loop_on_device(device: torch.device) -> Loop:
    """Return a loop that brings batches moved to a device."""

    def loop(batches: Sequence[Any], order: Sequence[int], visit: Visit) -> None:
        for number in order:
            visit(number, moved(batches[number], device))

    return loop


def with_room(
    compute: Callable[[torch.device | None], _Made], device: torch.device
) -> tuple[_Made, str]:
    """Return what is computed on a device, or on the CPU where its memory runs out; and what to say of that.

    Args:
        compute: Given None, computes where things lie; given the CPU, there.
        device: Where things lie.

    >>> with_room(lambda where: 1, torch.device("cpu"))
    (1, '')
    """
    try:
        return compute(None), ""
    except torch.OutOfMemoryError:
        pass  # what the error holds of the device's memory is let go of first
    return compute(torch.device("cpu")), RAN_OUT.format(device=device)
