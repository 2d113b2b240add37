"""Auto: for each weight, and for the whole network, the method that keeps the outputs best."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.methods.base import Found, Method, Problem, nearest, solved
from clipquant.quant.methods.distill import Distill
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
        distilled: Bits up to which, with data, codes are then trained on the network's outputs, see `Distill`;
            0: never.
        seconds: Most that this may take. Where that is reached, two runs may differ.
    """

    rtn: Rtn = field(default_factory=Rtn)
    mse: Mse = field(default_factory=Mse)
    gptq: Gptq = field(default_factory=Gptq)
    distilled: int = 2
    seconds: float = 60.0
    name: ClassVar[str] = "auto"
    needs_data: ClassVar[bool] = False
    summary: ClassVar[str] = (
        "`rtn` from 7 bits up; below, `mse` without data and the better of `gptq` and `mse` with it, "
        "from 2 bits down then `distill`"
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
        found = nearest(rest, solved(self.gptq, rest), solved(self.mse, rest))
        return plain.joined(self._distilled(rest, found))

    def _distilled(self, problem: Problem, found: Found) -> Found:
        """Return codes that are trained on the network's outputs, where any are narrow and that is nearer."""
        if all(spec.width > self.distilled for spec in map(problem.specs.get, found.codes) if spec):
            return found
        method = Distill(seconds=self.seconds)
        return method.learned(problem, found, method.wanted(problem))
