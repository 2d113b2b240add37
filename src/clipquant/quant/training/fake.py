"""Fake quantization: weights become the values of a grid on the way forward, and gradients pass on the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FakeQuantize(torch.autograd.Function):
    """The nearest values of a grid, bit for bit those that are stored, as part of a graph.

    The gradient of a weight is that of its value, but where it would take a weight further out of the
    grid's range; that of a scale is the rounding error of the weights inside the range and the code of
    those outside; that of a zero is what the weights outside give.

    Source:
        Bengio et al. 2013, arXiv 1308.3432 (straight through); Esser et al. 2019, arXiv 1902.08153
        (LSQ: learned steps); Bhalgat et al. 2020, arXiv 2004.09576 (LSQ+: learned zeros).

    >>> weight, scale = torch.tensor([0.6, 3.0], requires_grad=True), torch.tensor(1.0)
    >>> FakeQuantize.apply(weight, scale, torch.tensor(0.0), 1)
    tensor([1., 1.], grad_fn=<FakeQuantizeBackward>)
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, top: Any) -> Tensor:
        """Return `scale * (q - zero)`, q the nearest code from 0 to `top`."""
        place = _place(weight, scale, zero)
        codes = _codes(place, top).to(scale.dtype)
        ctx.save_for_backward(weight, scale, zero)
        ctx.top = top
        return (codes - zero) * scale

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        """Return the gradients of the weight, the scale and the zero."""
        (slope,), (weight, scale, zero), top = slopes, ctx.saved_tensors, ctx.top
        place = _place(weight, scale, zero)
        codes = _codes(place, top)
        of_scale = of_zero = None
        below, above = place < 0, place > top
        if ctx.needs_input_grad[1]:
            inside = torch.where(below | above, codes - zero, codes - place)
            of_scale = (slope * inside).sum_to_size(scale.shape).to(scale.dtype)
        if ctx.needs_input_grad[2]:
            outside = torch.where(below | above, -slope * scale, 0.0)
            of_zero = outside.sum_to_size(zero.shape).to(zero.dtype)
        outwards = ((place < -0.5) & (slope > 0)) | ((place > top + 0.5) & (slope < 0))
        return slope.masked_fill(outwards, 0.0).to(weight.dtype), of_scale, of_zero, None


def _place(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return where weights lie on their grid, as `Coded.nearest` computes it."""
    wide = torch.promote_types(weight.dtype, scale.dtype)
    step = torch.where(scale == 0, torch.inf, scale).to(wide)
    return weight.to(wide) / step + zero.to(wide)


def _codes(place: Tensor, top: Any) -> Tensor:
    return place.clamp(min=0).clamp(max=top).round()
