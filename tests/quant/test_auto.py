"""Sensitivities against their definition, grids against search, rows packed and read back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clipquant.artifact import read_artifact, save_artifact
from clipquant.quant.auto import allocator, range_grid
from clipquant.quant.grid import dequantize, dequantize_rows, quantize_rows
from clipquant.quant.layers import select
from clipquant.quant.ranges import minmax_grid
from clipquant.quant.sensitivity import output_divergence, squared_gradients
from clipquant.quant.spec import QuantSpec


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def test_squared_gradients_of_single_samples_are_their_mean() -> None:
    model, x = net(), torch.randn(12, 6)
    targets = select(model).targets

    def loss(m: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        return F.cross_entropy(m(batch), torch.tensor([1])), 1

    found = squared_gradients(model, targets, x.split(1), loss)
    expected = torch.zeros(5, 6)
    for row in x:
        model.zero_grad()
        F.cross_entropy(model(row[None]), torch.tensor([1])).backward()
        expected += model[0].weight.grad.square() / 12
    assert torch.allclose(found["0.weight"], expected, rtol=1e-5)


def test_divergence_has_the_curvature_of_the_kl_on_average() -> None:
    model, x = nn.Linear(4, 3).eval(), torch.randn(8, 4)
    targets = select(model).targets
    generator = torch.Generator().manual_seed(0)
    found = squared_gradients(
        model, targets, [x] * 3000, lambda m, b: output_divergence(m(b), generator)
    )["weight"]
    p = model(x).softmax(1).detach()
    exact = torch.einsum("nc,nd->cd", p * (1 - p), x.square()) / 8
    assert torch.allclose(found, exact, rtol=0.15)


def test_a_loss_that_is_not_finite_or_reaches_nothing_is_told() -> None:
    model = net()
    targets = select(model).targets
    with pytest.raises(ValueError, match="batch 1 is nan"):
        squared_gradients(model, targets, [0], lambda m, b: (m[0].weight.sum() * float("nan"), 1))
    with pytest.raises(ValueError, match="no batch"):
        squared_gradients(model, targets, [], lambda m, b: (m[0].weight.sum(), 1))
    free = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="no weight to quantize has a gradient"):
        squared_gradients(model, targets, [0], lambda m, b: (free.sum(), 1))


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("group_size", [40, 7])
def test_the_range_is_never_worse_than_min_max_for_the_weights_given(
    width: int, group_size: int
) -> None:
    torch.manual_seed(width)
    matrix, weight = torch.randn(6, 40), torch.rand(1, 40) + 0.01
    spec = QuantSpec(width, symmetric=False, granularity=group_size)

    def error(grid):  # type: ignore[no-untyped-def]
        return (weight * (dequantize_rows(quantize_rows(matrix, grid), grid) - matrix) ** 2).sum()

    assert (
        error(range_grid(matrix, weight, width, group_size))
        <= error(minmax_grid(matrix, spec)) * 1.01
    )


def test_rows_of_many_widths_survive_the_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = net()
    selection = select(model)
    fisher = {t.name: torch.rand(t.layout.rows, t.layout.columns) for t in selection.targets}
    found = allocator(model, selection, fisher)
    bits = {
        "0.weight": torch.tensor([0, 1, 3, 5, 8], dtype=torch.uint8),
        "2.weight": torch.tensor([2, 0, 7], dtype=torch.uint8),
    }
    weights = found.weights(bits)
    path = save_artifact(weights, tmp_path / "m.safetensors")
    read = read_artifact(path).weights
    for name, tensor in weights.tensors.items():
        assert torch.equal(read.tensors[name].bits, bits[name])
        assert torch.equal(dequantize(read.tensors[name]), dequantize(tensor))
    constant = dequantize(weights.tensors["0.weight"])[0]
    assert (constant == constant[0]).all()
    error = (dequantize(weights.tensors["0.weight"]) - model[0].weight).abs().amax(1)
    assert error[4] < error[2] < error[0]
    assert sum(found.sensitivities(bits).values()) > sum(
        found.sensitivities(found.uniform(8)).values()
    )
