"""Auto: for each weight, and for the whole network, the method that keeps the outputs best."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.methods.base import Found, Method, Problem, nearest, solved
from clipquant.quant.methods.gptq import Gptq
from clipquant.quant.methods.mse import Mse
from clipquant.quant.methods.rtn import Rtn

PLENTY = 7  # bits from which plain rounding loses nothing that data could save


@dataclass(frozen=True)
class Auto(Method):
    """Round plainly from 7 bits up; below, draw ranges in, or with data take what keeps the outputs better.

    Args:
        rtn: For wide codes, and for a grid that the reference definition fixes.
        mse: Without data.
        gptq: With data, beside `mse`.
    """

    rtn: Rtn = field(default_factory=Rtn)
    mse: Mse = field(default_factory=Mse)
    gptq: Gptq = field(default_factory=Gptq)
    name: ClassVar[str] = "auto"
    needs_data: ClassVar[bool] = False
    summary: ClassVar[str] = (
        "`rtn` from 7 bits up; below, `mse` without data and the better of `gptq` and `mse` with it"
    )

    def reads_data(self, spec: QuantSpec) -> bool:
        """Return whether plain rounding is not enough on such a grid.

        >>> Auto().reads_data(QuantSpec(bits=3)), Auto().reads_data(QuantSpec(bits=8))
        (True, False)
        """
        fixed = spec.granularity == "tensor" and spec.levels is not None
        return spec.width < PLENTY and not fixed

    def solve(self, problem: Problem) -> Found:
        """Return the codes of the method that suits each weight."""
        wide = [t for t in problem.targets if not self.reads_data(problem.specs[t.name])]
        plain = solved(self.rtn, problem.only(wide)) if wide else Found({})
        rest = problem.given(plain)
        if not rest.targets:
            return plain
        if not problem.calibration:
            return plain.joined(solved(self.mse, rest))
        return plain.joined(nearest(rest, solved(self.gptq, rest), solved(self.mse, rest)))
