"""The grid asked for: how many steps, where its zero lies, what shares a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from clipquant.errors import ArgumentError

Granularity: TypeAlias = Literal["tensor", "channel"] | int

MAX_BITS = 8


def check_bits(bits: Any, *, least: int = 1) -> int:
    """Return `bits` unchanged if it is a whole number from `least` to 8.

    Args:
        bits: The width asked for.
        least: The smallest width allowed, 0 or 1.

    Raises:
        ValueError: For anything else, quoting it.

    >>> check_bits(4)
    4
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not least <= bits <= MAX_BITS:
        raise ArgumentError(
            f"bits must be a whole number from {least} to {MAX_BITS}; got {bits!r}. {_unquoted(bits)}"
            "Use 8 for the widest grid, or bits='auto' with max_drop or max_size to have it chosen."
        )
    return bits


@dataclass(frozen=True)
class QuantSpec:
    """The grid asked for: every weight becomes one of `levels + 1` evenly spaced values.

    Args:
        bits: Width of a code, 1 to 8.
        levels: Number of steps of the grid. None: `2**bits - 1`, or `2**bits - 2` on a symmetric
            grid, so that 8 bits are the codes -127 .. 127.
        symmetric: Whether the grid is centred on an exact zero. None: True for plain 8 bits, whose
            half step lost to symmetry costs nothing, False below.
        granularity: What shares one scale: the whole "tensor", an output "channel", or a run of
            that many weights inside a channel.

    Raises:
        ValueError: For a grid that cannot be; the message names the rule, the value and the remedy.

    >>> QuantSpec(bits=4).steps
    15
    >>> QuantSpec(bits=8, levels=8).width  # nine codes fit into four bits
    4
    """

    bits: int = 8
    levels: int | None = None
    symmetric: bool | None = None
    granularity: Granularity = "channel"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        _check_levels(self.levels, self.bits)
        _check_granularity(self.granularity)
        if self.symmetric is None:
            object.__setattr__(self, "symmetric", self.bits == MAX_BITS and self.levels is None)
        if self.symmetric and self.steps < 2:
            raise ArgumentError(
                "a symmetric grid needs 2 steps or more (a code each side of zero); "
                f"bits={self.bits}, levels={self.levels} leave {self.steps}. Use symmetric=False, "
                "or bits=2."
            )

    @property
    def steps(self) -> int:
        """Number of steps between the grid's ends."""
        if self.levels is not None:
            return self.levels
        return (1 << self.bits) - (2 if self.symmetric else 1)

    @property
    def width(self) -> int:
        """Bits that one code takes in memory and on disk."""
        return self.bits if self.levels is None else self.levels.bit_length()

    def group_size(self, columns: int) -> int:
        """Number of neighbouring columns that share a scale in a matrix of `columns` columns."""
        if isinstance(self.granularity, int):
            return min(self.granularity, max(columns, 1))
        return max(columns, 1)


def _check_levels(levels: Any, bits: int) -> None:
    if levels is None:
        return
    most = 2**bits - 1
    if isinstance(levels, bool) or not isinstance(levels, int) or not 1 <= levels <= most:
        raise ArgumentError(
            f"levels (steps of the grid) must be a whole number from 1 to 2**bits - 1 = {most}; "
            f"got {levels!r}. Leave it out for the finest grid of {bits} bits."
        )


def _check_granularity(granularity: Any) -> None:
    if granularity in ("tensor", "channel"):
        return
    if isinstance(granularity, bool) or not isinstance(granularity, int) or granularity < 1:
        raise ArgumentError(
            "granularity must be 'tensor', 'channel' or a group size of 1 or more weights; "
            f"got {granularity!r}. {_unquoted(granularity)}'channel' is the usual choice."
        )


def _unquoted(value: Any) -> str:
    """Return what to do about a number that is given as text."""
    return "Leave out the quotes. " if isinstance(value, str) and value.strip().isdigit() else ""
