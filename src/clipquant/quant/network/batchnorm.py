"""BatchNorm statistics of the inputs that quantized weights give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipquant.quant.codes.paths import submodule
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.decisions import Decisions
from clipquant.quant.network.outputs import distances
from clipquant.quant.network.twin import Twin

_LEAST = 1e-12  # a variance below this is that of a constant channel


@dataclass
class _Shift:
    """How much one layer's inputs moved: per channel, averaged over the values seen."""

    mean: Tensor
    ratio: Tensor
    count: int

    def add_(self, mean: Tensor, ratio: Tensor, count: int) -> None:
        share = count / (self.count + count)
        self.mean = torch.lerp(self.mean, mean, share)
        self.ratio = torch.lerp(self.ratio, ratio, share)
        self.count += count


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that normalize by running statistics.

    >>> list(batch_norms(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))))
    ['1']
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def reestimate(exact: Twin, rounded: Twin, calibration: Calibration) -> dict[str, Tensor]:
    """Return running statistics that follow the means and variances which rounding moved.

    The float network's statistics come from a whole training, a few batches' would be a worse estimate.
    So each mean is moved by the difference between both networks' means on the same batches, and each
    variance by the ratio of theirs: networks with equal weights keep theirs. They are kept, too, where
    the new ones do not bring the outputs nearer.

    Args:
        exact: The float network, in eval mode.
        rounded: The quantized one; it holds the new statistics where they are better.
        calibration: Batches, and how to run them.

    Returns:
        State-dict key -> new statistic; empty where there is none, or none that is better.

    Source:
        Re-estimation after quantizing: Sun et al. 2019, arXiv 1911.07190; Nagel et al. 2019, arXiv 1906.04721.
    """
    layers = batch_norms(exact.model)
    if not layers or not len(calibration):
        return {}
    last = list(layers)[-1]
    before = distances(exact, [rounded], calibration, last)[0]
    new: dict[str, Tensor] = {}
    for name, shift in _shifts(exact, rounded, list(layers), calibration).items():
        mean, variance = _statistics(layers[name])
        new[f"{name}.running_mean"] = (mean + shift.mean.to(mean.device)).to(mean.dtype)
        new[f"{name}.running_var"] = (variance * shift.ratio.to(mean.device)).to(variance.dtype)
    rounded.hold_(new)
    if distances(exact, [rounded], calibration, last)[0] < before:
        return new
    rounded.drop_(list(new))
    return {}


def _shifts(
    exact: Twin, rounded: Twin, names: Sequence[str], calibration: Calibration
) -> dict[str, _Shift]:
    """Return how each layer's inputs moved, once the layers before it have made up for their own."""
    watch = _Watch({}, {})

    def visit(_number: int, batch: Any) -> None:
        watch.seen.clear()
        with torch.no_grad():
            taken = Decisions()
            for twin, see, way in (
                (exact, watch.note, taken.recorded),
                (rounded, watch.follow, taken.followed),
            ):
                with _watched(twin.model, names, see), way():
                    twin.run(calibration.forward, batch)

    calibration.each(visit)
    return watch.shifts


@dataclass
class _Watch:
    """The float network's moments in one batch, and how far the other's have been off so far."""

    seen: dict[str, list[tuple[Tensor, Tensor]]]
    shifts: dict[str, _Shift]

    def note(self, name: str, _layer: _BatchNorm, x: Tensor) -> None:
        self.seen.setdefault(name, []).append(_moments(x)[:2])

    def follow(self, name: str, layer: _BatchNorm, x: Tensor) -> Tensor | None:
        """Return the layer's output with statistics that follow this batch's shift."""
        if not self.seen.get(name):
            return None
        mean, variance = self.seen[name].pop(0)
        own_mean, own_variance, count = _moments(x)
        ratio = torch.where(variance > _LEAST, own_variance / variance.clamp(min=_LEAST), 1.0)
        shift = _Shift(own_mean - mean, ratio, count)
        if name in self.shifts:
            self.shifts[name].add_(shift.mean, shift.ratio, shift.count)
        else:
            self.shifts[name] = _Shift(shift.mean, shift.ratio, shift.count)
        return _normalized(layer, x, shift)


@contextmanager
def _watched(model: nn.Module, names: Sequence[str], see: Any) -> Iterator[None]:
    def hook(name: str) -> Any:
        return lambda layer, args, _output: see(name, layer, args[0])

    handles = [submodule(model, n).register_forward_hook(hook(n)) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return mean and variance of each channel (dimension 1), and the values that each is taken over."""
    values = x.transpose(0, 1).flatten(1).float()
    variance, mean = torch.var_mean(values, dim=1, correction=0)
    return mean, variance, values.shape[1]


def _statistics(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance of one of the `batch_norms`."""
    return cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var)


def _normalized(layer: _BatchNorm, x: Tensor, shift: _Shift) -> Tensor:
    mean, variance = _statistics(layer)
    # In the statistics' own dtype: under autocast the inputs may be of another.
    mean, variance = (mean + shift.mean).to(mean.dtype), (variance * shift.ratio).to(variance.dtype)
    return nn.functional.batch_norm(x, mean, variance, layer.weight, layer.bias, eps=layer.eps)
