"""A grid that training has left: the same values there and back, wherever it was kept."""

import torch

from clipquant.quant.codes.grid import Grid
from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.tensor import dequantize
from clipquant.quant.codes.trained import TrainedGrid


def made(zero):
    scale = torch.tensor([[0.5, 0.25], [1.0, 2.0]], dtype=torch.float16)
    zeros = None if zero is None else torch.full_like(scale, zero)
    return TrainedGrid(Grid(scale, zeros, 3 if zero is not None else 2, 2), 2, Layout((2, 3)))


def test_values_on_a_grid_stay_where_they_are():
    for zero in (None, 1.3):
        trained, weight = made(zero), torch.randn(2, 3)
        once = dequantize(trained.tensor(weight))
        assert not torch.equal(once, weight)
        assert torch.equal(dequantize(trained.tensor(once)), once)


def test_what_a_checkpoint_holds_gives_the_same_grid(tmp_path):
    weight = torch.randn(2, 3)
    for zero in (None, 1.3):
        trained = made(zero)
        torch.save(trained.state_dict(), tmp_path / "state")
        again = TrainedGrid.from_state_dict(
            torch.load(tmp_path / "state")
        )  # tensors and numbers alone
        assert again.layout == trained.layout
        assert torch.equal(again.tensor(weight).codes, trained.tensor(weight).codes)
        assert again.to(torch.device("cpu")).grid.scale.dtype is torch.float16
