"""AGC against its paper's equation, timm and optax."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clipquant.clip import AGC, Gradients, clip_gradients_

SHAPES = st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=3), min_size=1, max_size=5)


SEEDS = st.integers(0, 2**31 - 1)


def parameters(shapes: list[list[int]], seed: int, scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = scale * torch.randn(param.shape, generator=generator)
    return params


def gradients(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.grad.clone() for param in params if param.grad is not None]


def agc_reference(grad: Tensor, weight: Tensor, ratio: float, eps: float) -> Tensor:
    """Equation 3 of arXiv 2102.06171, unit by unit in float64."""
    grad, weight = grad.double(), weight.detach().double()
    units = [(grad, weight)] if grad.ndim < 2 else list(zip(grad, weight, strict=True))
    clipped = []
    for g, w in units:
        g_norm, w_norm = g.square().sum().sqrt(), max(float(w.square().sum().sqrt()), eps)
        clipped.append(
            g * (ratio * w_norm / g_norm) if g_norm > 0 and g_norm / w_norm > ratio else g
        )
    return clipped[0] if grad.ndim < 2 else torch.stack(clipped) if clipped else grad


@given(SHAPES, SEEDS, st.floats(1e-3, 1.0), st.sampled_from([0.001, 1.0]))
def test_agc_equals_equation_3_of_its_paper(
    shapes: list[list[int]], seed: int, ratio: float, scale: float
) -> None:
    params = parameters(shapes, seed, scale)
    expected = [agc_reference(p.grad, p, ratio, 1e-3) for p in params]
    clip_gradients_(params, AGC(ratio))
    for param, e in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad.double(), e, rtol=1e-5, atol=1e-8)


def load_timm_agc() -> Callable[..., None]:
    """Load the one file of timm that is needed: the package imports torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        pytest.skip("timm is not installed")
    path = Path(found.origin).parent / "utils" / "agc.py"
    spec = importlib.util.spec_from_file_location("timm_agc", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.adaptive_clip_grad


@pytest.mark.parametrize("scale", [0.001, 0.1, 10.0])
def test_agc_equals_timm(scale: float) -> None:
    adaptive_clip_grad = load_timm_agc()
    shapes = [[8, 3, 3, 3], [8], [16, 8], [], [4, 8, 5]]
    ours, theirs = parameters(shapes, 6, scale), parameters(shapes, 6, scale)
    clip_gradients_(ours, AGC(0.05))
    adaptive_clip_grad(theirs, clip_factor=0.05)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8)


def test_agc_lets_zero_initialised_weights_learn() -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    weight.grad = torch.randn(3, 4)
    clip_gradients_(weight, AGC(0.01, eps=1e-3))
    torch.testing.assert_close(weight.grad.norm(dim=1), torch.full((3,), 1e-5))


@given(SHAPES, SEEDS, st.floats(1e-3, 1.0), st.sampled_from([1e-3, 1.0]))
def test_agc_equals_the_formula_of_optax_for_weights_with_outputs_first(
    shapes: list[list[int]], seed: int, ratio: float, scale: float
) -> None:
    params = parameters(shapes, seed, scale)
    before = [g.double() for g in gradients(params)]
    clip_gradients_(params, AGC(ratio, eps=1e-3))
    for param, g in zip(params, before, strict=True):
        units = tuple(range(1, g.ndim)) if g.ndim > 1 else tuple(range(g.ndim))
        g_norm = g.square().sum(units, keepdim=True).sqrt() if units else g.abs()
        weight = param.detach().double()
        w_norm = weight.square().sum(units, keepdim=True).sqrt() if units else weight.abs()
        largest = ratio * w_norm.clamp(min=1e-3)
        expected = torch.where(g_norm < largest, g, g * (largest / g_norm.clamp(min=1e-6)))
        torch.testing.assert_close(param.grad.double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (300, 200, 3)])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_units_along_an_axis_are_those_of_the_transposed_weight(
    shape: tuple[int, ...], axis: int, scale: float
) -> None:
    (ours,) = parameters([list(shape)], 1, scale)
    theirs = nn.Parameter(ours.detach().movedim(axis, 0).contiguous())
    theirs.grad = ours.grad.movedim(axis, 0).contiguous()
    record = clip_gradients_(ours, AGC(0.05, axis=axis), measure=True)
    reference = clip_gradients_(theirs, AGC(0.05), measure=True)
    torch.testing.assert_close(ours.grad.movedim(axis, 0), theirs.grad, rtol=1e-5, atol=1e-9)
    assert record.grad_norm_clipped == pytest.approx(reference.grad_norm_clipped, rel=1e-5)
    plan, _ = AGC(0.05, axis=axis).plan(Gradients([ours.grad]), [ours], {})
    assert plan.clip(ours.grad, ours).shape == ours.shape


def test_an_axis_that_is_none_is_refused_before_anything_changes() -> None:
    params = parameters([[3, 4, 5], [3, 4]], 1)
    before = gradients(params)
    with pytest.raises(ValueError, match=r"AGC: axis=2 is no axis of a gradient of shape \(3, 4\)"):
        clip_gradients_(params, AGC(0.01, axis=2))
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))
    with pytest.raises(ValueError, match="axis must be a whole number"):
        AGC(axis=0.5)


def test_a_sparse_gradient_of_an_empty_batch_is_left_alone() -> None:
    embedding = nn.Embedding(20, 4, sparse=True)
    (embedding(torch.tensor([], dtype=torch.long)) ** 2).sum().backward()
    assert not clip_gradients_(embedding.parameters(), AGC(0.01)).clipped
