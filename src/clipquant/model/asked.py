"""Typical slips in what `quantize` and QuantizeOnFitEnd are given: each told with its remedy, or taken as meant."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipquant.errors import ArgumentError, ArgumentTypeError, MissingFileError
from clipquant.quant.methods import METHODS, Distill
from clipquant.quant.recipe import Recipe


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
        check_teacher(method)
        return
    plain = "".join(filter(str.isalnum, method.lower()))
    near = get_close_matches(plain, METHODS, 1, 0.75)
    if near:
        raise ArgumentError(f"method={method!r} is no method; did you mean {near[0]!r}?")


def check_teacher(method: Any) -> None:
    """Raise for a method's teacher that is to be read from a file that is not there.

    >>> from clipquant.quant.methods import Distill
    >>> check_teacher(Distill(teacher="nowhere.ckpt"))
    Traceback (most recent call last):
    ...
    clipquant.errors.MissingFileError: teacher must be a module or the path of a checkpoint; there is no file \
'nowhere.ckpt'.
    """
    teacher = getattr(method, "teacher", None)
    if isinstance(teacher, (str, Path)) and not Path(teacher).is_file():
        raise MissingFileError(
            f"teacher must be a module or the path of a checkpoint; there is no file {str(teacher)!r}."
        )


def with_teacher(recipe: Recipe, model: nn.Module) -> Recipe:
    """Return a recipe whose method has its teacher as a module, read from its checkpoint where it is a path.

    Args:
        recipe: The settings.
        model: Of the teacher's class. A LightningModule's checkpoint brings its own sizes along; any other is a
            state dict of the model's own.

    Raises:
        ArgumentError: If the file does not hold such a network.
    """
    solver = recipe.solver
    path = getattr(solver, "teacher", None)
    if not isinstance(solver, Distill) or not isinstance(path, (str, Path)):
        return recipe
    check_teacher(solver)
    try:
        load = getattr(type(model), "load_from_checkpoint", None)
        if load is not None:
            teacher = load(str(path), map_location="cpu")
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
            teacher = copy.deepcopy(model)
            teacher.load_state_dict(held.get("state_dict", held))
    except Exception as error:  # whatever a file that is something else makes of it
        raise ArgumentError(
            f"teacher must be a checkpoint of a {type(model).__name__}; {str(path)!r} is not: "
            f"{type(error).__name__}: {str(error)[:200]}. Give the network itself, as a module."
        ) from error
    return replace(recipe, method=replace(solver, teacher=teacher))


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
