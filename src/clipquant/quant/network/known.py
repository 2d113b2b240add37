"""What a module gave, kept so that it can be given again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass
class Known:
    """An output: any nesting of tensors and plain values.

    Args:
        leaves: Its tensors and values; of a tensor that was given up, its shape, dtype and device alone.
        spec: How they are nested.
    """

    leaves: list[Any]
    spec: TreeSpec

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(leaf.nbytes for leaf in self.leaves if isinstance(leaf, Tensor))

    def value(self) -> Any:
        """Return the output, in tensors of its own: zeros for those that were given up.

        >>> made = known({"a": torch.ones(2), "b": 3})
        >>> made.value()
        {'a': tensor([1., 1.]), 'b': 3}
        >>> made.give_up_()
        >>> made.value(), made.nbytes
        ({'a': tensor([0., 0.]), 'b': 3}, 0)
        """
        return tree_unflatten([_again(leaf) for leaf in self.leaves], self.spec)

    def give_up_(self) -> None:
        """Keep the shapes alone."""
        self.leaves = [
            _Shape(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
            for leaf in self.leaves
        ]


@dataclass(frozen=True)
class _Shape:
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def known(output: Any) -> Known | None:
    """Return an output, copied; None where it holds something else than tensors and plain values."""
    leaves, spec = tree_flatten(output)
    if not all(_is_dense(leaf) or isinstance(leaf, _PLAIN) for leaf in leaves):
        return None
    held = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return Known(held, spec)


def _is_dense(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided and type(leaf) is Tensor


def _again(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    if isinstance(leaf, _Shape):
        return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
    return leaf


def flat_tensors(value: Any) -> list[Tensor]:
    """Return the tensors of any nesting.

    >>> flat_tensors([{"a": torch.ones(1)}, 2])
    [tensor([1.])]
    """
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def is_same(own: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Return whether tensors are equal to the last bit, NaN included."""
    if len(own) != len(wanted):
        return False
    return all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(own, wanted, strict=True)
    )
