"""Each layer's own output error, so that no layer ends up worse than plain rounding leaves it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from clipquant.quant.codes.ranges import plain_rounding
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.devices import moved
from clipquant.quant.network.layers import Target, bias_of
from clipquant.quant.network.moments import HESSIAN_LIMIT, Moments, observe
from clipquant.quant.network.twin import Twin

_ENOUGH = 8  # batches: second moments need fewer than learning does
_QUICK = 1024  # columns up to which the error is worth computing whole at every step


@dataclass(frozen=True)
class OwnError:
    """The squared error of a layer's outputs on the float network's inputs, and plain rounding's.

    Args:
        matrix: float32 (rows, columns): the float weights.
        hessian: (groups, columns, columns), the inputs' second moments, their mean left out where a
            bias takes it up; or (groups, columns), their diagonal.
        plain: Error of plain rounding.
        plain_quick: The same by the diagonal alone.
    """

    matrix: Tensor
    hessian: Tensor
    plain: float
    plain_quick: float

    @classmethod
    def of(
        cls, matrix: Tensor, spec: QuantSpec, moments: Moments | None, centred: bool
    ) -> OwnError:
        """Return the error of a weight whose inputs have some moments; None: all inputs count alike."""
        matrix = matrix.float()
        moments = None if moments is None else moved(moments, matrix.device)
        hessian = (
            matrix.new_ones(1, matrix.shape[1]) if moments is None else moments.hessian.float()
        )
        if moments is not None and centred and hessian.dim() == 3:
            hessian = hessian - moments.mean[:, :, None] * moments.mean[:, None]
        plain = plain_rounding(matrix, spec).values() - matrix
        quick = _weighted(plain, _diagonal(hessian))
        return cls(matrix, hessian, float(_weighted(plain, hessian)), float(quick))

    def is_harmed(self, values: Tensor) -> bool:
        """Return whether (rows, columns) values do worse than plain rounding."""
        return float(_weighted(values - self.matrix, self.hessian)) > self.plain

    def share(self, values: Tensor) -> Tensor:
        """Return the error of values as a share of plain rounding's, by the diagonal for wide layers.

        >>> spec = QuantSpec(1, symmetric=False, granularity="tensor")
        >>> own = OwnError.of(torch.tensor([[0.0, 0.4, 1.0]]), spec, None, False)
        >>> own.share(torch.tensor([[0.0, 0.2, 1.0]]))
        tensor(0.2500)
        """
        off = values - self.matrix
        if self.hessian.dim() == 3 and self.matrix.shape[1] > _QUICK:
            return _weighted(off, _diagonal(self.hessian)) / (self.plain_quick or 1.0)
        return _weighted(off, self.hessian) / (self.plain or 1.0)


def own_errors(
    twin: Twin,
    targets: Sequence[Target],
    specs: Mapping[str, QuantSpec],
    calibration: Calibration,
) -> dict[str, OwnError]:
    """Return the own error of every target of a float model; the moments of all are kept.

    Layers whose second moments would together take more than the limit for one keep the diagonal.
    """
    errors = {}
    limit = HESSIAN_LIMIT // len(targets)
    for part in _in_parts(targets):
        moments = observe((twin, twin), part, calibration.first(_ENOUGH), limit=limit)
        for target in part:
            centred = bias_of(twin.model, target) is not None
            matrix = target.layout.fold(target.weight.detach())
            seen = moments.get(target.name)
            errors[target.name] = OwnError.of(matrix, specs[target.name], seen, centred)
    return errors


def _in_parts(targets: Sequence[Target], size: int = 16) -> Iterator[Sequence[Target]]:
    for start in range(0, len(targets), size):
        yield targets[start : start + size]


def _diagonal(hessian: Tensor) -> Tensor:
    return hessian.diagonal(dim1=1, dim2=2) if hessian.dim() == 3 else hessian


def _weighted(off: Tensor, hessian: Tensor) -> Tensor:
    """Return the sum over rows of `d H d^T`."""
    parts = off.reshape(hessian.shape[0], -1, off.shape[1])
    if hessian.dim() == 3:
        return ((parts @ hessian) * parts).sum()
    return (parts.square() * hessian[:, None]).sum()
