"""clip_gradients_ on gradients of every kind, and what its record says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipquant.clip import AGC, AdaGC, AutoClip, Indicator, Norm, Value, ZClip, clip_gradients_

RULES: list[Any] = [
    Value(0.1),
    Norm(0.1),
    Norm(0.1, "inf"),
    Norm(0.1, scope="tensor"),
    Norm(0.1, scope="group"),
    AGC(0.01),
    AutoClip(10),
    ZClip(max_norm=0.1),
    AdaGC(max_norm=0.1),
    Indicator(0.5),
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=repr)


def with_grad(grad: Tensor, weight: Tensor | None = None) -> nn.Parameter:
    param = nn.Parameter(torch.ones(grad.shape, dtype=grad.dtype) if weight is None else weight)
    param.grad = grad
    return param


@every_rule
def test_sparse_gradients_are_clipped_as_their_dense_form(rule: Any) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 3)
    indices = torch.tensor([[4, 1, 4, 0]])  # row 4 twice: its entries count as their sum
    sparse = with_grad(torch.sparse_coo_tensor(indices, torch.randn(4, 3), (6, 3)), weight.clone())
    dense = with_grad(sparse.grad.to_dense(), weight.clone())
    clip_gradients_(sparse, rule)
    clip_gradients_(dense, rule)
    torch.testing.assert_close(sparse.grad.to_dense(), dense.grad, rtol=1e-6, atol=1e-8)


def test_an_embeddings_own_sparse_gradient_is_clipped_and_steps() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 1, 7])).sum().backward()
    clip_gradients_(embedding.parameters(), Value(0.5))
    torch.optim.SGD(embedding.parameters(), lr=1.0).step()
    expected = before.clone()
    expected[[1, 7]] -= 0.5
    torch.testing.assert_close(embedding.weight.detach(), expected)


@pytest.mark.parametrize(
    "rule", [r for r in RULES if not isinstance(r, (Value, Indicator))], ids=repr
)
def test_complex_gradients_are_scaled_by_the_norm_of_their_magnitudes(rule: Any) -> None:
    torch.manual_seed(0)
    grad, weight = (
        torch.randn(3, 4, dtype=torch.complex64),
        torch.randn(3, 4, dtype=torch.complex64),
    )
    twin_grad, twin_weight = grad.abs(), weight.abs()
    whole, twin = with_grad(grad.clone(), weight), with_grad(twin_grad.clone(), twin_weight)
    clip_gradients_(whole, rule)
    clip_gradients_(twin, rule)
    torch.testing.assert_close(whole.grad.abs(), twin.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(whole.grad.angle(), grad.angle(), rtol=1e-5, atol=1e-5)


def test_complex_gradients_are_clamped_in_both_parts_even_when_lazily_conjugated() -> None:
    param = with_grad(
        torch.tensor([3 + 0.05j, -0.02 - 4j]).conj(), torch.zeros(2, dtype=torch.complex64)
    )
    clip_gradients_(param, 0.1)
    torch.testing.assert_close(param.grad, torch.tensor([0.1 - 0.05j, -0.02 + 0.1j]))


@every_rule
def test_a_tied_parameter_counts_once(rule: Any) -> None:
    tied, single = with_grad(torch.tensor([3.0, 4.0])), with_grad(torch.tensor([3.0, 4.0]))
    record = clip_gradients_([tied, tied], rule, measure=True)
    clip_gradients_([single], rule)
    assert torch.equal(tied.grad, single.grad)
    assert record.grad_norm == (4.0 if rule == Norm(0.1, "inf") else 5.0)


@every_rule
def test_missing_empty_scalar_and_frozen_parameters_are_no_obstacle(rule: Any) -> None:
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    params = [
        nn.Parameter(torch.ones(2)),
        with_grad(torch.zeros(0, 4)),
        with_grad(torch.zeros(4, 0)),
        with_grad(torch.tensor(2.0)),
        frozen,
        with_grad(torch.full((2, 2), 3.0)),
    ]
    record = clip_gradients_(params, rule, on_nonfinite="skip", measure=True)
    assert params[0].grad is None
    assert frozen.grad is None
    assert record.names == ("1", "2", "3", "5")
    assert record.grad_norm == (3.0 if rule == Norm(0.1, "inf") else pytest.approx(math.sqrt(40)))


@every_rule
def test_without_any_gradient_nothing_happens(rule: Any) -> None:
    record = clip_gradients_([nn.Parameter(torch.ones(2))], rule)
    assert record.grad_norm is None
    assert not record.clipped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_norms_accumulate_in_float32(dtype: torch.dtype) -> None:
    # The norm, 65536 * 2, exceeds the largest float16; torch's own function zeroes all gradients here.
    param = with_grad(torch.full((1 << 20,), 128.0, dtype=dtype))
    record = clip_gradients_(param, Norm(1024.0))
    assert record.grad_norm == 131072.0
    assert torch.equal(param.grad, torch.full_like(param.grad, 1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@every_rule
def test_every_rule_works_in_every_precision(rule: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    grad, weight = torch.randn(5, 7).to(dtype), torch.randn(5, 7).to(dtype)
    param, wide = with_grad(grad.clone(), weight), with_grad(grad.double(), weight.double())
    clip_gradients_(param, rule)
    clip_gradients_(wide, rule)
    tolerance = 2 * torch.finfo(dtype).eps if dtype is not torch.float64 else 1e-6
    torch.testing.assert_close(param.grad.double(), wide.grad, rtol=tolerance, atol=1e-6)


def test_gradients_of_several_precisions_share_one_norm() -> None:
    params = [
        with_grad(torch.tensor([3.0], dtype=torch.bfloat16)),
        with_grad(torch.tensor([4.0])),
        with_grad(torch.tensor([12.0], dtype=torch.float64)),
    ]
    record = clip_gradients_(params, Norm(1.3))
    assert record.grad_norm == pytest.approx(13.0)
    assert [float(p.grad) for p in params] == pytest.approx([0.3, 0.4, 1.2], rel=5e-3)


def test_a_norm_whose_squares_overflow_is_finite_and_exact() -> None:
    params = [with_grad(torch.tensor([3e30, 4e30])), with_grad(torch.tensor([12e30]))]
    record = clip_gradients_(params, Norm(1.0), on_nonfinite="raise")
    assert record.grad_norm == pytest.approx(13e30, rel=1e-6)
    assert torch.cat([p.grad for p in params]).tolist() == pytest.approx(
        [3 / 13, 4 / 13, 12 / 13], rel=1e-6
    )


@every_rule
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("measure", [False, True])
def test_skip_removes_every_gradient_and_names_the_parameter(
    rule: Any, bad: float, measure: bool
) -> None:
    params = [
        with_grad(torch.ones(3)),
        with_grad(torch.tensor([1.0, bad])),
        with_grad(torch.ones(5000)),
    ]
    record = clip_gradients_(
        [("a", params[0]), ("b", params[1]), ("c", params[2])],
        rule,
        None,
        on_nonfinite="skip",
        measure=measure,
    )
    assert all(param.grad is None for param in params)
    assert record.skipped
    assert not record.clipped
    assert record.nonfinite == ("b",)


@every_rule
def test_raise_leaves_the_gradients_for_inspection(rule: Any) -> None:
    params = [with_grad(torch.full((3,), 9.0)), with_grad(torch.tensor([1.0, math.nan]))]
    with pytest.raises(FloatingPointError, match="NaN or infinite gradients in 1:"):
        clip_gradients_(params, rule, on_nonfinite="raise")
    assert params[0].grad.tolist() == [9.0] * 3


@every_rule
def test_zero_then_clips_what_is_left(rule: Any) -> None:
    damaged, healthy = (
        with_grad(torch.tensor([3.0, math.inf, math.nan])),
        with_grad(torch.tensor([3.0, 0.0, 0.0])),
    )
    clip_gradients_(damaged, rule, on_nonfinite="zero")
    clip_gradients_(healthy, rule)
    assert torch.equal(damaged.grad, healthy.grad)


def test_propagate_does_what_torch_does() -> None:
    params = [with_grad(torch.tensor([2.0, math.inf])), with_grad(torch.tensor([math.nan, 5.0]))]
    clip_gradients_(params, 1.0)
    assert params[0].grad.tolist() == [1.0, 1.0]
    assert math.isnan(params[1].grad[0])
    assert float(params[1].grad[1]) == 1.0


def test_a_group_may_bring_its_own_rule_or_none() -> None:
    params = [with_grad(torch.full((4,), 3.0)) for _ in range(4)]
    groups = [
        {"params": [params[0]]},
        {"params": [params[1]], "clip": Norm(1.0)},
        {"params": [params[2]], "clip": 0.5},
        {"params": [params[3]], "clip": None},
    ]
    record = clip_gradients_(groups, Value(2.0), measure=True)
    assert [float(p.grad[0]) for p in params] == pytest.approx([2.0, 0.5, 0.5, 3.0])
    assert record.grad_norm == pytest.approx(12.0)


def test_groups_with_rules_of_their_own_keep_their_own_state() -> None:
    params = [with_grad(torch.tensor([1.0])), with_grad(torch.tensor([2.0]))]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "clip": AutoClip(50)}]
    record = clip_gradients_(groups, AutoClip(50))
    assert record.state["history"].tolist() == [1.0]
    assert record.state["group1.history"].tolist() == [2.0]
    record = clip_gradients_(groups, AutoClip(50), record.state)
    assert record.state["group1.history"].tolist() == [2.0, 2.0]


@every_rule
def test_the_record_tells_the_norms_before_and_after(rule: Any) -> None:
    torch.manual_seed(0)
    params = [
        with_grad(torch.randn(40, 30)),
        with_grad(torch.randn(9000)),
        with_grad(torch.randn(3)),
    ]
    order = math.inf if rule == Norm(0.1, "inf") else 2.0
    expected = torch.stack([p.grad.norm(order) for p in params])
    record = clip_gradients_(params, rule, measure=True)
    after = torch.stack([p.grad.norm(order) for p in params])
    torch.testing.assert_close(record.norms.float(), expected)
    torch.testing.assert_close(record.norms_clipped.float(), after, rtol=1e-5, atol=1e-8)
    assert record.grad_norm == pytest.approx(float(expected.norm(order)), rel=1e-5)
    assert record.grad_norm_clipped == pytest.approx(float(after.norm(order)), rel=1e-5)
    assert record.clip_coef == pytest.approx(
        float(after.norm(order) / expected.norm(order)), rel=1e-5
    )


@pytest.mark.parametrize(
    "rule", [Value(10.0), Norm(1e4), Norm(1e4, scope="tensor"), AGC(1e6)], ids=repr
)
@pytest.mark.parametrize("policy", ["skip", "propagate"])
def test_nothing_to_clip_changes_no_bit_and_is_recorded_so(rule: Any, policy: Any) -> None:
    param = with_grad(torch.randn(50, 60))
    before = param.grad.clone()
    record = clip_gradients_(param, rule, on_nonfinite=policy, measure=True)
    assert torch.equal(param.grad, before)
    assert not record.clipped
    assert record.clip_coef == 1.0


def test_many_chunks_are_clipped_as_one() -> None:
    torch.manual_seed(0)
    ours = [with_grad(torch.randn(700, 1000)) for _ in range(4)]
    expected = [p.grad.clone().clamp_(-0.5, 0.5) for p in ours]
    record = clip_gradients_(ours, Value(0.5), on_nonfinite="skip", measure=True)
    assert all(torch.equal(p.grad, e) for p, e in zip(ours, expected, strict=True))
    assert record.grad_norm_clipped == pytest.approx(
        float(torch.stack([e.double().norm() for e in expected]).norm()), rel=1e-6
    )
