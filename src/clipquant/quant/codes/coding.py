"""How a file holds codes: dense, or in an entropy code where that is smaller."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

from torch import Tensor

from clipquant.errors import ArgumentError
from clipquant.quant.codes.entropy import LIBRARY, coder_library, encode
from clipquant.quant.codes.pack import packed_bytes
from clipquant.quant.codes.tensor import QuantizedTensor
from clipquant.quant.codes.weights import QuantizedWeights

Coding: TypeAlias = Literal["dense", "entropy", "auto"]

CODINGS = ("dense", "entropy", "auto")
_RECORD = 20  # bytes by which a weight's record grows
_WORTH = 20  # "auto": a 20th of the file is worth an extra that its readers need


def check_coding(coding: Any) -> None:
    """Raise unless `coding` is one, and what it needs is installed.

    Raises:
        ArgumentError: For anything else.
        MissingPackageError: For "entropy" without the library of the range coder.

    >>> check_coding("zip")
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: coding must be one of 'dense', 'entropy', 'auto'; got 'zip'.
    """
    if coding not in CODINGS:
        raise ArgumentError(
            f"coding must be one of {', '.join(map(repr, CODINGS))}; got {coding!r}."
        )
    if coding == "entropy":
        coder_library()


def with_coding(weights: QuantizedWeights, coding: Coding) -> QuantizedWeights:
    """Return the same weights with streams for those that a file is to hold in an entropy code.

    Args:
        weights: The weights; streams that they have are left out or made anew.
        coding: "dense": none. "entropy": each weight whose stream is smaller than its dense codes. "auto": the
            same where the library is installed and the file gets at least 5 % smaller.

    Raises:
        ArgumentError: For anything else.
        MissingPackageError: For "entropy" without the library.
    """
    check_coding(coding)
    dense = {name: replace(tensor, stream=None) for name, tensor in weights.tensors.items()}
    bare = replace(weights, tensors=dense)
    if not is_coded(coding):
        return bare
    coded = {name: streamed(tensor) for name, tensor in dense.items()}
    saved = sum(_dense(t) - t.stream.nbytes for t in coded.values() if t.stream is not None)
    if coding == "auto" and saved * _WORTH < _bytes(bare):
        return bare
    return replace(weights, tensors=coded)


def is_coded(coding: Coding) -> bool:
    """Return whether codes may come to stand in an entropy code: where that is asked for and can be done."""
    return coding == "entropy" or (coding == "auto" and find_spec(LIBRARY) is not None)


def streamed(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return a weight with its stream, where that is smaller than dense codes."""
    stream = encode(tensor.codes, tensor.grid, tensor.bits)
    smaller = stream.nbytes + _RECORD < _dense(tensor)
    return replace(tensor, stream=stream if smaller else None)


def _dense(tensor: QuantizedTensor) -> int:
    return packed_bytes(tensor.bits, tuple(tensor.codes.shape))


def _bytes(weights: QuantizedWeights) -> int:
    """Return the bytes of all tensors of a file with dense codes."""
    sides = ((t.scale, t.zero, t.bits) for t in weights.tensors.values())
    parts = (part.nbytes for side in sides for part in side if isinstance(part, Tensor))
    floats = sum(tensor.nbytes for tensor in weights.floats.values())
    return floats + sum(parts) + sum(map(_dense, weights.tensors.values()))
