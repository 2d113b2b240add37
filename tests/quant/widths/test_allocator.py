"""Sensitivities against their definition, allocations packed and read back, biases and notes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clipquant.artifact import read_artifact, save_artifact
from clipquant.quant.codes.tensor import dequantize
from clipquant.quant.codes.weights import QuantizedWeights
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.layers import select
from clipquant.quant.network.moments import observe
from clipquant.quant.network.twin import Twin
from clipquant.quant.widths.allocator import allocator, output_curvature
from clipquant.quant.widths.sensitivity import output_divergence, squared_gradients


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def test_squared_gradients_of_single_samples_are_their_mean() -> None:
    model, x = net(), torch.randn(12, 6)
    targets = select(model).targets

    def loss(m: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        return F.cross_entropy(m(batch), torch.tensor([1])), 1

    found = squared_gradients(model, targets, Calibration(x.split(1)), loss)
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
        model, targets, Calibration([x] * 3000), lambda m, b: output_divergence(m(b), generator)
    )["weight"]
    p = model(x).softmax(1).detach()
    exact = torch.einsum("nc,nd->cd", p * (1 - p), x.square()) / 8
    assert torch.allclose(found, exact, rtol=0.15)


def test_a_loss_that_is_not_finite_or_reaches_nothing_is_told() -> None:
    model = net()
    targets = select(model).targets
    with pytest.raises(ValueError, match="batch 1 is nan"):
        squared_gradients(
            model, targets, Calibration([0]), lambda m, b: (m[0].weight.sum() * float("nan"), 1)
        )
    with pytest.raises(ValueError, match="no batch"):
        squared_gradients(model, targets, Calibration([]), lambda m, b: (m[0].weight.sum(), 1))
    free = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="no weight to quantize has a gradient"):
        squared_gradients(model, targets, Calibration([0]), lambda m, b: (free.sum(), 1))


def test_rows_of_many_widths_survive_the_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = net()
    selection = select(model)
    fisher = {t.name: torch.rand(t.layout.rows, t.layout.columns) for t in selection.targets}
    found = allocator(model, selection, fisher, Calibration([torch.randn(64, 6)]))
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


def test_output_curvature_is_the_gradients_of_the_outputs() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(7, 4).eval(), torch.randn(4000, 7)
    targets = select(model).targets
    pull = torch.tensor([3.0, 1.0, 0.5, 0.0])

    def loss(m: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        sign = torch.randn(len(batch), 4)
        return (m(batch) * sign * pull).sum() / len(batch), len(batch)

    fisher = squared_gradients(model, targets, Calibration([x] * 200), loss)["weight"]
    moments = observe((Twin(model),) * 2, targets, Calibration([x]))["weight"]
    assert torch.allclose(output_curvature(fisher, moments).float(), pull.square(), rtol=0.15)


def test_the_bias_gives_back_the_mean_that_the_codes_lose() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(256, 20) + 2
    selection = select(model)
    fisher = {t.name: torch.rand(t.layout.rows, t.layout.columns) for t in selection.targets}
    found = allocator(model, selection, fisher, Calibration([x]))
    state = found.weights(found.uniform(2)).state_dict()
    assert not torch.equal(state["0.bias"], model[0].bias)
    mean = F.linear(x, state["0.weight"], state["0.bias"]).mean(0)
    assert torch.allclose(mean, model[0](x).mean(0), atol=1e-4)


def test_weights_whose_inputs_are_unknown_are_rounded_and_say_so() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5)).eval()
    model.register_module("aside", nn.Linear(3, 2))
    selection = select(model)
    fisher = {t.name: torch.rand(t.layout.rows, t.layout.columns) for t in selection.targets}
    batch = torch.randint(0, 9, (40,))
    found = allocator(
        model,
        selection,
        fisher,
        Calibration([batch], lambda m, b: m[1](m[0](b))),
        fixed={"1.weight": 3},
    )
    weights = found.weights(found.uniform(4))
    assert {n: t.method for n, t in weights.tensors.items()} == {
        "0.weight": "mse",
        "1.weight": "gptq",
        "aside.weight": "mse",
    }
    assert set(weights.notes) == {"0.weight", "aside.weight"}
    assert weights.tensors["1.weight"].bits.unique().tolist() == [3]
    assert set(found.biases) == {"1.weight"}


def test_a_bias_that_two_layers_share_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).eval()
    model[1].bias = model[0].bias
    selection = select(model)
    fisher = {t.name: torch.rand(5, 5) for t in selection.targets}
    found = allocator(model, selection, fisher, Calibration([torch.randn(30, 5) + 1]))
    state = found.weights(found.uniform(1)).state_dict()
    assert torch.equal(state["0.bias"], model[0].bias)
    assert torch.equal(state["1.bias"], model[0].bias)


def test_batch_norms_follow_the_weights_where_that_brings_the_outputs_nearer() -> None:
    gains = [_gain_of_statistics(seed) for seed in range(6)]
    assert all(gain >= 0 for gain in gains)
    assert max(gains) > 0.01


def _gain_of_statistics(seed: int) -> float:
    """Return by what share new statistics bring a network of 1 bit nearer to its float outputs."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4),
    )  # fmt: skip
    x = torch.randn(128, 1, 8, 8) + 0.5
    for _ in range(40):
        model(x)
    model.eval()
    selection = select(model)
    fisher = {t.name: torch.rand(t.layout.rows, t.layout.columns) for t in selection.targets}
    found = allocator(model, selection, fisher, Calibration([x]))
    plain = found.weights(found.uniform(1))
    settled = found.settled(plain)
    assert {n for n in plain.floats if not torch.equal(plain.floats[n], settled.floats[n])} <= {
        f"{layer}.running_{part}" for layer in (1, 4) for part in ("mean", "var")
    }

    def distance(weights: QuantizedWeights) -> float:
        guest = copy.deepcopy(model)
        guest.load_state_dict(weights.state_dict())
        return float((guest(x) - model(x)).square().mean())

    return 1 - distance(settled) / distance(plain)


def test_tokens_that_no_batch_has_and_layers_that_no_loss_meets_keep_bits() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(50, 16), "head": nn.Linear(16, 3)}).eval()
    model["aside"] = nn.Linear(8, 8)
    batch = torch.randint(0, 25, (200,))

    def forward(m: nn.ModuleDict, b: torch.Tensor) -> torch.Tensor:
        return m["head"](m["table"](b))

    selection = select(model)
    fisher = squared_gradients(
        model,
        selection.targets,
        Calibration([batch]),
        lambda m, b: output_divergence(forward(m, b)),
    )
    found = allocator(model, selection, fisher, Calibration([batch], forward))
    assert not fisher["table.weight"][25:].any()
    bits = found.frontier.fill(found.frontier.most_bytes // 2)
    assert bits["aside.weight"].unique().tolist() == [8]
    assert (bits["table.weight"][25:] > 0).all()
    assert bits["table.weight"][:25].float().mean() > bits["table.weight"][25:].float().mean()
    assert "no batch reaches it" in found.notes["aside.weight"]
