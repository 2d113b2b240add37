"""Typical slips in what `quantize` and QuantizeOnFitEnd are given: each told with its remedy, or taken as meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from clipquant.errors import ArgumentError, ArgumentTypeError
from clipquant.quant.methods import METHODS


def check_model(model: Any) -> None:
    """Raise unless `model` is a module that has been made.

    >>> check_model({"weight": Tensor()})
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentTypeError: quantize takes a module; got a state dict of 1 entries. Build the model, \
load_state_dict it, and pass the model.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        said = f"the class {model.__name__}. Pass an instance: {model.__name__}(...)."
    elif isinstance(model, Mapping):
        said = f"a state dict of {len(model)} entries. Build the model, load_state_dict it, and pass the model."
    elif isinstance(model, str):
        said = f"the text {model!r}. Load the model, and pass it."
    else:
        said = f"{type(model).__name__}. Pass the torch.nn.Module that holds the weights."
    raise ArgumentTypeError(f"quantize takes a module; got {said}")


def check_spelling(method: Any) -> None:
    """Raise for a method's name in another spelling, naming the one that is near.

    >>> check_spelling("GPTQ")
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: method='GPTQ' is no method; did you mean 'gptq'?
    """
    if not isinstance(method, str) or method in METHODS:
        return
    plain = "".join(filter(str.isalnum, method.lower()))
    near = get_close_matches(plain, METHODS, 1, 0.75)
    if near:
        raise ArgumentError(f"method={method!r} is no method; did you mean {near[0]!r}?")


def as_batches(data: Iterable[Any] | None) -> Iterable[Any] | None:
    """Return calibration data as batches: a tensor, or a dict of tensors, is one batch and not many.

    >>> as_batches(Tensor(8, 64))[0].shape
    torch.Size([8, 64])
    """
    if isinstance(data, (str, bytes)):
        raise ArgumentTypeError(f"data must be an iterable of batches; got the text {data!r}.")
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if data is not None and not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise ArgumentTypeError(
            f"data must be an iterable of batches, as a DataLoader or a list; got {type(data).__name__}. "
            "Put a single batch into a list: data=[batch]."
        )
    return data
