"""Second moments: those of the inputs kept whole, split into fitted and held apart, chance told from signal."""

import pytest
import torch
from torch import nn

from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.layers import select
from clipquant.quant.network.moments import observe
from clipquant.quant.network.twin import Twin


def moments(layer, batches, **asked):
    twin = Twin(layer)
    return observe((twin, twin), select(layer).targets, Calibration(batches), **asked)["weight"]


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_fitted_and_held_apart_are_the_whole_together(count):
    torch.manual_seed(0)
    layer, batches = nn.Linear(6, 4), [torch.randn(8, 6) for _ in range(count)]
    whole, split = moments(layer, batches), moments(layer, batches, hold_apart=True)
    assert whole.apart is None
    apart = split.apart
    assert split.count + apart.count == whole.count == 8 * count
    both = split.hessian * split.count + apart.hessian * apart.count
    assert torch.allclose(both / whole.count, whole.hessian, atol=1e-5)
    x = torch.cat(batches)
    assert torch.allclose(whole.hessian[0], x.T @ x / len(x), atol=1e-5)
    assert torch.allclose(split.means()[0], whole.mean, atol=1e-6)
    assert torch.allclose(split.means()[1], whole.output, atol=1e-6)
    if count >= 4:
        held = torch.cat([batches[i] for i in range(3, count, 4)])
        assert torch.allclose(apart.hessian[0], held.T @ held / len(held), atol=1e-5)


@pytest.mark.parametrize("rows", [4, 64])
def test_chance_is_told_from_signal(rows):
    torch.manual_seed(0)
    layer = nn.Linear(40, 4)
    mixing = torch.randn(40, 40)
    noise = moments(layer, [torch.randn(rows, 40) for _ in range(6)]).noise
    signal = moments(layer, [torch.randn(rows, 3) @ mixing[:3] for _ in range(6)]).noise
    assert noise > 0.8
    assert signal < noise / 2


def test_one_batch_counts_its_positions_as_pieces():
    torch.manual_seed(0)
    layer = nn.Linear(40, 4)
    assert moments(layer, [torch.randn(20, 40)]).noise > 0.8


def test_quiet_inputs_count_as_much_as_loud_ones():
    torch.manual_seed(0)
    layer, size = nn.Linear(30, 4), torch.logspace(0, -3, 30)
    batches = [torch.randn(16, 2) @ torch.ones(2, 30) + 0.1 * torch.randn(16, 30) for _ in range(5)]
    plain = moments(layer, batches).noise
    assert moments(layer, [batch * size for batch in batches]).noise == pytest.approx(
        plain, rel=1e-3
    )
