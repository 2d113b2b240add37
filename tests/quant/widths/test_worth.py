"""Codes that are worth their bits: against plain rounding, and against a search by hand."""

import math

import pytest
import torch

from clipquant.quant.widths import worth
from clipquant.quant.widths.worth import Stepped, worthy, worthy_apart

LIMITS = torch.tensor([1, 2, 4, 7, 13])


def laplacian(rows, columns, seed=0):
    random = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, (rows, columns), generator=random) * 2 - 1
    return -torch.rand(rows, columns, generator=random).clamp(min=1e-6).log() * sign


def start(matrix, limits=LIMITS):
    extent = matrix.abs().amax(1, keepdim=True)
    scale = torch.cat([extent / (n - 0.25) for n in limits])
    return Stepped.nearest(matrix, scale, limits, 10**6, torch.ones(len(limits)))


def hessian(columns, seed=1):
    x = torch.randn(300, columns, generator=torch.Generator().manual_seed(seed))
    x = x @ (torch.eye(columns) + 0.3)
    return x.T @ x / 300


def curve(held, matrix, h):
    """Return bits and errors a weight at each step, means over all rows."""
    off = held.values() - matrix.repeat(len(held.limits), 1)
    errors = ((off @ h) * off).sum(1).reshape(len(held.limits), -1).mean(1) / matrix.shape[1]
    return (held.bits() / matrix.shape[1]).mean(0).tolist(), errors.tolist()


@pytest.mark.parametrize("apart", [True, False])
def test_less_error_for_as_many_bits_than_plain_rounding(apart):
    matrix = laplacian(60, 200)
    h = torch.eye(200) if apart else hessian(200)
    first = start(matrix)
    found = (
        worthy_apart(first, matrix, torch.ones_like(matrix), None)
        if apart
        else worthy(first, matrix, h, None)
    )
    bits, errors = curve(first, matrix, h)
    gained = []
    for had, error in zip(*curve(found, matrix, h), strict=True):
        above = next((i for i, b in enumerate(bits) if b >= had), None)
        if above:
            share = (had - bits[above - 1]) / (bits[above] - bits[above - 1])
            plain = math.exp(
                math.log(errors[above - 1]) * (1 - share) + math.log(errors[above]) * share
            )
            gained.append(error / plain)
    assert len(gained) >= 3
    assert max(gained) < 1
    assert min(gained) < (0.9 if apart else 0.7)


def test_one_sweep_is_the_best_of_a_search_by_hand(monkeypatch):
    monkeypatch.setattr(worth, "_SWEEPS", 1)
    matrix, first = laplacian(3, 40), start(laplacian(3, 40), LIMITS[2:3])
    found = worthy_apart(first, matrix, torch.ones_like(matrix), None)
    prices = first.prices()[0]
    for row in range(3):
        step = float(first.scale[row])
        error = float((first.values()[row] - matrix[row]).square().sum())
        pull = 2 * math.log(2) * error / 40
        for column in range(40):
            near = round(float(matrix[row, column]) / step)
            near = max(-4, min(4, near))
            tried = {near, near - (near > 0) + (near < 0), 0}
            costs = {
                q: (q * step - float(matrix[row, column])) ** 2 + pull * float(prices[q + 127])
                for q in tried
            }
            assert costs[int(found.codes[row, column])] <= min(costs.values()) + 1e-6


def test_zeros_that_are_kept_and_limits_hold():
    matrix = laplacian(20, 50)
    kept = torch.rand(20, 50, generator=torch.Generator().manual_seed(3)) < 0.5
    matrix[kept] = 0.0
    for found in (
        worthy(start(matrix), matrix, hessian(50), kept),
        worthy_apart(start(matrix), matrix, torch.ones_like(matrix), kept),
    ):
        assert not found.codes[kept.repeat(len(LIMITS), 1)].any()
        assert bool((found.codes.abs() <= found.tops()).all())
        assert torch.equal(found.codes, found.codes.round())


def test_rows_of_zeros_stay_zero():
    matrix = torch.zeros(2, 30)
    found = worthy(start(matrix), matrix, hessian(30), None)
    assert not found.codes.any()
    assert torch.isfinite(found.values()).all()


def test_groups_have_steps_of_their_own():
    matrix = laplacian(4, 64)
    matrix[:, 32:] *= 50
    extent = matrix.reshape(4, 2, 32).abs().amax(2)
    first = Stepped.nearest(matrix, extent / 12.75, LIMITS[-1:], 32, torch.ones(1))
    found = worthy(first, matrix, torch.eye(64), None)
    assert found.codes[:, :32].abs().amax() > 8
    assert torch.equal(found.scale, extent / 12.75)
