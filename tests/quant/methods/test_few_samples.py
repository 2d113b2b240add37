"""With fewer samples than columns, what is fitted to them must hold for others too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from clipquant.quant.network.calibration import Calibration
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe


class Recurrent(nn.Module):
    """An LSTM's last state, as speaker encoders take it."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(32, 96, 2, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


def one_layer(columns):
    return nn.Linear(columns, 48), (columns,)


def stacked(columns):
    net = nn.Sequential(
        nn.Linear(40, columns), nn.Tanh(), nn.Linear(columns, columns), nn.Tanh(), nn.Linear(columns, 32)
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight.mul_(torch.exp(0.7 * torch.randn(columns, 40)) * 3)
    return net, (40,)


def error(model, weights, x):
    """Return the relative error of a model's outputs with some weights."""
    rounded = copy.deepcopy(model)
    rounded.load_state_dict(weights.state_dict())
    with torch.no_grad():
        wanted = model(x)
        return float((rounded(x) - wanted).norm() / (wanted - wanted.mean(0)).norm())


@pytest.mark.parametrize(
    ("made", "samples", "bits"),
    [
        (lambda: one_layer(256), 64, 2),
        (lambda: one_layer(512), 32, 2),
        (lambda: one_layer(512), 32, 4),
        (lambda: stacked(192), 64, 3),
        (lambda: (Recurrent(), (20, 32)), 24, 3),
    ],
)
def test_what_few_samples_showed_holds_for_others(made, samples, bits):
    torch.manual_seed(0)
    model, shape = made()
    model.eval()
    mix = torch.randn(shape[-1], shape[-1]) / shape[-1] ** 0.5
    draw = lambda count: torch.randn(count, *shape) @ mix  # noqa: E731
    calibration, fresh = draw(samples), draw(1000)
    fitted = quantize_weights(model, Recipe(bits), Calibration(list(calibration.split(8))))
    free = quantize_weights(model, Recipe(bits, method="mse"))
    held = error(model, fitted, fresh)
    assert held <= 1.1 * error(model, free, fresh)
    assert held <= max(1.6 * error(model, fitted, calibration), 0.1)
