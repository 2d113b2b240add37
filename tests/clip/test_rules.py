"""Rules against torch and against the formulas of their papers."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clipquant.clip import AGC, Indicator, Norm, Rule, Value, clip_gradients_

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


@given(SHAPES, SEEDS, st.floats(0, 3))
def test_value_equals_clamp_bit_for_bit(shapes: list[list[int]], seed: int, limit: float) -> None:
    params = parameters(shapes, seed)
    expected = [g.clamp_(-limit, limit) for g in gradients(params)]
    clip_gradients_(params, Value(limit))
    assert all(torch.equal(p.grad, e) for p, e in zip(params, expected, strict=True))


@given(SHAPES, SEEDS, st.floats(0.01, 10), st.sampled_from([1.0, 2.0, 3.0, math.inf]))
def test_norm_equals_clip_grad_norm(
    shapes: list[list[int]], seed: int, limit: float, order: float
) -> None:
    shapes = [
        [*shape[:-1], shape[-1] + 1] if shape else shape for shape in shapes
    ]  # torch's inf norm needs elements
    shapes = [[max(1, n) for n in shape] for shape in shapes]
    ours, theirs = parameters(shapes, seed), parameters(shapes, seed)
    record = clip_gradients_(ours, Norm(limit, order))
    total = nn.utils.clip_grad_norm_(theirs, limit, order)
    assert record.grad_norm == pytest.approx(float(total), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-6, atol=1e-7)


@given(SHAPES, SEEDS)
def test_norm_with_nothing_to_clip_leaves_gradients_bit_for_bit(
    shapes: list[list[int]], seed: int
) -> None:
    params = parameters(shapes, seed)
    before = gradients(params)
    record = clip_gradients_(params, Norm(1e6))
    assert not record.clipped
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


def test_norm_of_each_tensor_is_that_of_the_formula() -> None:
    params = parameters([[3, 4], [5], []], seed=3, scale=10.0)
    before = gradients(params)
    clip_gradients_(params, Norm(0.5, scope="tensor"))
    for param, grad in zip(params, before, strict=True):
        norm = math.sqrt(sum(v * v for v in grad.double().flatten().tolist()))
        torch.testing.assert_close(
            param.grad.double(), grad.double() * min(1.0, 0.5 / norm), rtol=1e-5, atol=1e-7
        )


def test_norm_of_each_group_is_that_of_torch_on_the_group() -> None:
    ours, theirs = (
        parameters([[3, 4], [5], [2, 2]], seed=4),
        parameters([[3, 4], [5], [2, 2]], seed=4),
    )
    clip_gradients_([{"params": ours[:2]}, {"params": ours[2:]}], Norm(0.3, scope="group"))
    nn.utils.clip_grad_norm_(theirs[:2], 0.3)
    nn.utils.clip_grad_norm_(theirs[2:], 0.3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7)


def test_norm_warms_its_limit_up_linearly() -> None:
    rule, state, limits = Norm(1.0, warmup_steps=4, warmup_start=0.2), None, []
    for _ in range(6):
        (param,) = parameters([[10]], seed=5, scale=100.0)
        record = clip_gradients_(param, rule, state)
        state = record.state
        limits.append(float(param.grad.norm()))
    assert limits == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0, 1.0], rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Value(-0.5), "Value: limit must be a number >= 0, got -0.5"),
        (lambda: Value("1.0"), "Value: limit must be a number >= 0, got '1.0'"),
        (lambda: Value(True), "Value: limit must be a number >= 0, got True"),
        (lambda: Norm(float("nan")), "Norm: max_norm must be a number >= 0, got nan"),
        (lambda: Norm(1.0, 0.5), "Norm: norm_type must be a number >= 1, got 0.5"),
        (lambda: Norm(1.0, "two"), "Norm: norm_type must be a number >= 1, got 'two'"),
        (
            lambda: Norm(1.0, scope="layer"),
            'Norm: scope must be "global", "group" or "tensor", got \'layer\'',
        ),
        (
            lambda: Norm(1.0, warmup_steps=-1),
            "Norm: warmup_steps must be a whole number >= 0, got -1",
        ),
    ],
)
def test_values_out_of_range_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()  # type: ignore[operator]
    assert message in str(error.value)


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


@given(SHAPES, SEEDS, st.sampled_from([0.0, 0.5]))
def test_indicator_marks_elements_beyond_the_threshold(
    shapes: list[list[int]], seed: int, threshold: float
) -> None:
    params = parameters(shapes, seed)
    for param in params:
        param.grad[param.grad.abs() < 0.2] = 0.0
    expected = [
        torch.tensor([float(abs(v) > threshold) for v in g.flatten().tolist()])
        for g in gradients(params)
    ]
    record = clip_gradients_(params, Indicator(threshold), measure=True)
    for param, e in zip(params, expected, strict=True):
        assert torch.equal(param.grad.flatten(), e)
    count = sum(len(e) for e in expected)
    assert record.nonzero_share == pytest.approx(
        sum(float(e.sum()) for e in expected) / count if count else 0.0
    )


@given(SHAPES, SEEDS, st.floats(0.01, 10))
def test_norm_equals_the_formula_of_optax(shapes: list[list[int]], seed: int, limit: float) -> None:
    params = parameters(shapes, seed)
    before = [g.double() for g in gradients(params)]
    total = math.sqrt(sum(float(g.square().sum()) for g in before))
    clip_gradients_(params, Norm(limit))
    for param, g in zip(params, before, strict=True):
        expected = g if total < limit else g / total * limit
        torch.testing.assert_close(param.grad.double(), expected, rtol=2e-4, atol=1e-6)


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


@dataclass(frozen=True)
class SignRule:
    """A rule of a user's own: the sign of each element, times the share of the step."""

    step_size: float = 0.1

    def init(self) -> dict[str, Tensor]:
        return {"steps": torch.zeros(())}

    def plan(
        self, grads: Any, params: Any, state: dict[str, Tensor]
    ) -> tuple[float, dict[str, Tensor]]:
        assert len(grads) == len(params)
        steps = state["steps"] + 1
        return self.step_size / float(steps), {"steps": steps}

    def clip(self, grad: Tensor, param: Tensor, plan: float) -> Tensor:
        return grad.sign() * plan


def test_a_rule_of_ones_own_needs_three_methods_and_no_base_class() -> None:
    (param,) = parameters([[4]], 7)
    signs = param.grad.sign()
    record = clip_gradients_(param, SignRule())
    assert torch.equal(param.grad, signs * 0.1)
    record = clip_gradients_(param, SignRule(), record.state)
    assert torch.equal(param.grad, signs * 0.05)
    assert record.clipped
    assert isinstance(SignRule(), Rule)
