"""RTN: every weight rounded to the nearest value of the min-max grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.ranges import plain_rounding
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.codes.tensor import QuantizedTensor
from clipquant.quant.methods.base import Found, Method, Problem, by_weight


@dataclass(frozen=True)
class Rtn(Method):
    """Round to nearest on the min-max grid: `Q(w) = round((w - min) / (max - min) * levels)`.

    Source:
        Jacob et al. 2018, arXiv 1712.05877, equations 1 to 3, with a fractional zero.
    """

    name: ClassVar[str] = "rtn"
    needs_data: ClassVar[bool] = False
    summary: ClassVar[str] = "rounds to the nearest value of the min-max grid"

    def solve(self, problem: Problem) -> Found:
        return by_weight(plain_rounding)(problem)


def quantize_weight(
    weight: Tensor, spec: QuantSpec, layout: Layout | None = None
) -> QuantizedTensor:
    """Return one weight rounded to the nearest value of its min-max grid.

    Args:
        weight: Floating, of two dimensions or more.
        spec: The grid asked for.
        layout: Its output-channel axis. None: axis 0.

    >>> quantize_weight(torch.tensor([[0.0, 1.0, 2.2, 3.0]]), QuantSpec(2)).codes
    tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    """
    layout = layout or Layout(tuple(weight.shape))
    coded = plain_rounding(layout.fold(weight.detach()), spec)
    return QuantizedTensor(coded, spec.width, layout, weight.dtype, "rtn")
