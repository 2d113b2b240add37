"""What codes take on disk, known from a weight's shape and the grid asked for."""

from __future__ import annotations

from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.pack import packed_bytes
from clipquant.quant.codes.spec import QuantSpec

_SCALE = 2  # bytes of a scale or a zero at least


def coded_bytes(layout: Layout, spec: QuantSpec) -> int:
    """Return the fewest bytes that a weight's codes, scales and zeros can take on a grid.

    Args:
        layout: How the weight folds into rows.
        spec: The grid.

    >>> coded_bytes(Layout((10, 1)), QuantSpec(4)), coded_bytes(Layout((10, 64)), QuantSpec(4))
    (45, 360)
    """
    rows, columns = layout.rows, layout.columns
    groups = -(-columns // spec.group_size(columns))
    scales = (1 if spec.granularity == "tensor" else rows) * groups * (1 if spec.symmetric else 2)
    return packed_bytes(spec.width, (rows, columns)) + _SCALE * scales
