"""Second moments: those of the inputs kept whole, split into fitted and held apart, chance told from signal."""

import pytest
import torch
from torch import nn

import clipquant.quant.network.moments as measured
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.layers import select
from clipquant.quant.network.moments import observe
from clipquant.quant.network.patches import patches, positions_of
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


CONVOLUTIONS = {
    "1d": (nn.Conv1d(2, 4, 5, 3, 2), (2, 23)),
    "same": (nn.Conv1d(2, 4, 4, 1, "same"), (2, 23)),
    "dilated": (nn.Conv2d(2, 4, (3, 2), 2, 1, (2, 1), 2), (2, 9, 11)),
    "transposed": (nn.ConvTranspose2d(2, 4, 3, 2, 1, 1, dilation=2), (2, 5, 6)),
    "linear": (nn.Linear(7, 4), (3, 7)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_positions_are_counted_without_unfolding_them(kind):
    layer, shape = CONVOLUTIONS[kind]
    target, value = select(layer).targets[0], torch.randn(3, *shape)
    assert positions_of(target, value) == sum(p.shape[1] for p in patches(target, value))
    assert positions_of(target, value[0]) == sum(p.shape[1] for p in patches(target, value[0]))


def test_positions_are_taken_by_need_and_from_every_batch(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(measured, "_ELEMENTS", 64 * 1000)
    layer = nn.Conv1d(8, 2, 8)
    batches = [torch.full((20, 8, 107), float(i)) for i in range(4)]  # 8,000 positions
    found = moments(layer, batches)
    assert 1000 / 1.2 < found.count <= 1000
    assert torch.allclose(found.hessian, torch.full((1, 64, 64), (0 + 1 + 4 + 9) / 4), rtol=1e-3)
    few = [batch[:2] for batch in batches]  # 800: all are needed
    assert moments(layer, few).count == 800
