"""MSE: round to nearest on the range of least squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clipquant.quant.codes.grid import Coded
from clipquant.quant.codes.ranges import mse_grid
from clipquant.quant.methods.base import Found, Method, Problem, by_weight


@dataclass(frozen=True)
class Mse(Method):
    """Round to nearest on the min-max grid, drawn in to where the squared error of the weights is least.

    Source:
        Range search as in Nagel et al. 2021, arXiv 2106.08295, section 3.1.
    """

    name: ClassVar[str] = "mse"
    needs_data: ClassVar[bool] = False
    summary: ClassVar[str] = "draws the grid in to where the squared error is least"

    def solve(self, problem: Problem) -> Found:
        return by_weight(lambda w, spec: Coded.nearest(w, mse_grid(w, spec)))(problem)
