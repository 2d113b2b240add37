"""What torch's and optax's own tests of clipping ask for, asked of the rules here."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipquant.clip import AGC, Norm, Value
from clipquant.clip.apply import clip_gradients_
from clipquant.errors import ClipquantError

ORDERS = [0.1, 1.0, 2.0, 3.5, math.inf]
BROKEN = [math.nan, math.inf, -math.inf]


def params_of(grads: list[Tensor]) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    return params


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bad", BROKEN)
@pytest.mark.parametrize("place", ["first", "last", "all"])
def test_an_error_of_what_is_not_finite_leaves_every_gradient(
    order: float, bad: float, place: str
) -> None:
    # torch: test_clip_grad_norm_error_if_nonfinite.
    grads = [torch.full((3, 4), 5.0), torch.full((10,), -7.0)]
    for grad in {"first": grads[:1], "last": grads[1:], "all": grads}[place]:
        grad.view(-1)[-1] = bad
    params = params_of(grads)
    with pytest.raises(FloatingPointError, match="NaN or infinite gradients in") as caught:
        clip_gradients_(params, Norm(1.0, norm_type=order), on_nonfinite="raise")
    assert isinstance(caught.value, ClipquantError)
    for param, grad in zip(params, grads, strict=True):
        torch.testing.assert_close(param.grad, grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("order", ORDERS)
def test_every_gradient_is_scaled_by_one_factor(order: float) -> None:
    # torch: test_clip_grad_norm: the ratio of all elements is one number, and the norm is the limit.
    grads = [torch.arange(1.0, 101.0).view(10, 10), torch.ones(10).div(1000)]
    params = params_of(grads)
    record = clip_gradients_(params, Norm(2.0, norm_type=order), measure=True)
    ratios = torch.cat([(p.grad / g).flatten() for p, g in zip(params, grads, strict=True)])  # type: ignore[operator]
    assert ratios.std() < 1e-6
    assert ratios.max() <= 1.0
    flat = torch.cat([p.grad.flatten() for p in params]).double()  # type: ignore[union-attr]
    assert torch.linalg.vector_norm(flat, order).item() == pytest.approx(2.0, rel=1e-4)
    assert record.grad_norm_clipped == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("rule", [Norm(1.0), Value(0.5), AGC(0.01)], ids=repr)
def test_clipping_twice_is_clipping_once(rule: Any) -> None:
    # optax: the transformation is idempotent on what it has returned.
    torch.manual_seed(0)
    params = params_of([torch.randn(4, 3), torch.randn(5)])
    clip_gradients_(params, rule)
    once = [p.grad.clone() for p in params]  # type: ignore[union-attr]
    clip_gradients_(params, rule)
    for param, grad in zip(params, once, strict=True):
        torch.testing.assert_close(param.grad, grad, rtol=2e-6, atol=0)


@pytest.mark.parametrize("count", [1, 3])
def test_one_tensor_counts_as_a_list_of_one(count: int) -> None:
    # torch: test_clip_grad_value, test_parameters_to_vector: a bare tensor, a list and a generator are alike.
    grads = [torch.full((4,), 3.0) for _ in range(count)]
    forms: list[Any] = [lambda ps: ps, iter, lambda ps: (p for p in ps), tuple]
    forms += [lambda ps: ps[0]] if count == 1 else []
    for form, rule in itertools.product(forms, (Value(2.5), Norm(1.0))):
        params = params_of(grads)
        clip_gradients_(form(params), rule)
        expected = params_of(grads)
        if isinstance(rule, Value):
            nn.utils.clip_grad_value_(expected, 2.5)
        else:
            nn.utils.clip_grad_norm_(expected, 1.0)
        for ours, theirs in zip(params, expected, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def timm_agc(params: list[nn.Parameter], clip_factor: float, eps: float, norm_type: float) -> None:
    """Clip as timm's adaptive_clip_grad does, in its own words."""

    def unitwise_norm(x: Tensor) -> Tensor:
        if x.ndim <= 1:
            return x.norm(norm_type)
        return x.norm(norm_type, dim=tuple(range(1, x.ndim)), keepdim=True)

    for param in params:
        if param.grad is None:
            continue
        limit = unitwise_norm(param.detach()).clamp_(min=eps).mul_(clip_factor)
        norm = unitwise_norm(param.grad.detach())
        clipped = param.grad.detach() * (limit / norm.clamp(min=1e-6))
        param.grad.detach().copy_(torch.where(norm < limit, param.grad.detach(), clipped))


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_timms_three_modes_of_one_dispatch(mode: str, scale: float) -> None:
    # timm: dispatch_clip_grad(parameters, value, mode): a convolution, a matrix, a vector, a scalar, one without grad.
    torch.manual_seed(0)
    shapes = [(4, 3, 3, 3), (5, 6), (7,), (), (2, 2)]
    grads = [scale * torch.randn(shape) for shape in shapes]
    ours, theirs = params_of(grads), params_of(grads)
    ours[-1].grad = theirs[-1].grad = None
    if mode == "norm":
        clip_gradients_(ours, Norm(0.05))
        nn.utils.clip_grad_norm_(theirs, 0.05, norm_type=2.0)
    elif mode == "value":
        clip_gradients_(ours, Value(0.05))
        nn.utils.clip_grad_value_(theirs, 0.05)
    else:
        clip_gradients_(ours, AGC(0.05, eps=1e-3))
        timm_agc(theirs, 0.05, 1e-3, 2.0)
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-9)
    assert ours[-1].grad is None
