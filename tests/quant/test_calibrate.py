"""Methods that look at inputs: what they must never do worse than rounding, and what they refuse."""

import copy

import pytest
import torch
from torch import nn

from clipquant.model import quantize
from clipquant.quant.calibrate import calibrate
from clipquant.quant.gptq import OutputError, gptq_codes, plan_walk, refine
from clipquant.quant.grid import dequantize_rows, quantize_rows
from clipquant.quant.layers import select, weights_of
from clipquant.quant.model import quantize_weights
from clipquant.quant.observe import calibration_data, observe
from clipquant.quant.patches import patches
from clipquant.quant.ranges import minmax_grid
from clipquant.quant.solve import solve
from clipquant.quant.spec import QuantSpec


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def images(count=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 2, 8, 8, generator=generator) for _ in range(count)]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.lstm = nn.LSTM(16, 12, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(24, 16, num_layers=2, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 11, bias=False)
        self.out.weight = self.embed.weight
        self.spare = nn.Linear(3, 3)

    def forward(self, tokens):
        x = self.gru(self.lstm(self.embed(tokens))[0])[0]
        return self.out(self.attention(x, x, x)[0])


@pytest.fixture(scope="module")
def network():
    model = convolutional()
    model(images()[0])
    return model.eval()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding="same", padding_mode="reflect"), (3, 4, 11)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (3, 4, 11, 12)),
        (nn.Conv3d(2, 4, 2), (2, 2, 4, 5, 6)),
        (nn.ConvTranspose1d(4, 6, 2, stride=3, padding=2), (3, 4, 7)),
        (
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            (3, 4, 5, 6),
        ),
        (nn.ConvTranspose3d(2, 4, 2, stride=2), (2, 2, 3, 3, 3)),
        (nn.Linear(4, 6), (2, 3, 4)),
    ],
)
def test_patches_times_rows_is_the_layers_output(layer, shape):
    layer.bias = None
    target = next(weights_of(layer))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = torch.cat(list(patches(target, x)), 1)
    matrix = target.layout.fold(target.weight)
    found = rows @ matrix.reshape(len(rows), -1, matrix.shape[1]).mT
    wanted = layer(x)
    if isinstance(layer, nn.Linear):
        wanted = wanted.reshape(1, -1, 6)
    else:
        groups = layer.groups
        wanted = wanted.reshape(len(wanted), groups, wanted.shape[1] // groups, -1)
        wanted = wanted.permute(1, 0, 3, 2).reshape(groups, -1, wanted.shape[2])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 5])
@pytest.mark.parametrize("symmetric", [False, True])
def test_output_error_is_never_above_plain_rounding(network, bits, granularity, symmetric):
    if symmetric and bits == 1:
        pytest.skip("one bit has no symmetric grid")
    targets = select(network).targets
    moments = observe((network, network), targets, images())
    for target in targets:
        matrix = target.layout.fold(target.weight.detach())
        spec = QuantSpec(bits, granularity=granularity, symmetric=symmetric)
        found = solve(matrix, spec, moments[target.name], centred=False)
        assert found.error <= found.rtn_error * (1 + 1e-5) + 1e-7


def test_error_reported_is_that_of_the_outputs(network):
    target = select(network).targets[-1]
    moments = observe((network, network), [target], images())[target.name]
    matrix = target.layout.fold(target.weight.detach())
    found = solve(matrix, QuantSpec(3), moments, centred=False)
    x = torch.cat([network[:-1](batch) for batch in images()])
    wanted = x @ matrix.T
    got = x @ dequantize_rows(found.codes, found.grid).T
    share = (got - wanted).square().sum() / wanted.square().sum()
    assert found.error == pytest.approx(float(share.detach()), rel=1e-2)


def test_gptq_makes_up_for_earlier_columns():
    torch.manual_seed(0)
    x = torch.randn(400, 6) @ torch.randn(6, 48) + 0.1 * torch.randn(400, 48)
    matrix, hessian = torch.randn(16, 48), x.T @ x / 400
    error = OutputError(hessian, matrix @ hessian, ((x @ matrix.T) ** 2).mean(0))
    grid = minmax_grid(matrix, QuantSpec(3))
    rtn = error.of_codes(quantize_rows(matrix, grid), grid).sum()
    damped = error.damped(matrix, 0.01)
    codes = gptq_codes(plan_walk(damped), grid)
    gptq = error.of_codes(codes, grid).sum()
    assert gptq < 0.5 * rtn
    refined = refine(damped, codes, grid)
    assert (damped.of_codes(*refined) <= damped.of_codes(codes, grid) + 1e-4).all()


def test_dead_inputs_and_zero_channels_are_no_trouble():
    matrix = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    matrix[1] = 0
    layer = nn.Linear(6, 4)
    layer.weight.data.copy_(matrix)
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    x[:, 2] = 0
    weights = quantize_weights(layer, 2, method="gptq", batches=[x])
    assert torch.isfinite(weights.state_dict()["weight"]).all()
    assert (weights.state_dict()["weight"][1] == 0).all()


def test_calibration_beats_rounding_at_the_networks_output(network):
    batches = images(8)
    wanted = torch.cat([network(b) for b in batches])
    losses = {}
    for method in ("rtn", "gptq"):
        weights = quantize_weights(network, 2, method=method, batches=batches)
        other = copy.deepcopy(network)
        other.load_state_dict(weights.state_dict())
        losses[method] = float((torch.cat([other(b) for b in batches]) - wanted).square().mean())
    assert losses["gptq"] < 0.3 * losses["rtn"]


def test_every_layer_kind_calibrates_or_says_why_not():
    torch.manual_seed(0)
    model = Recurrent().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tokens = [torch.randint(0, 11, (4, 9)) for _ in range(3)]
    weights = quantize_weights(model, 3, method="gptq", batches=tokens)
    assert "never reach" in weights.notes["spare.weight"]
    assert "inner layer" in weights.notes["gru.weight_ih_l1"]
    calibrated = ["lstm.weight_ih_l0", "lstm.weight_hh_l0_reverse", "attention.in_proj_weight"]
    calibrated += ["attention.out_proj.weight", "embed.weight"]
    assert not set(calibrated) & set(weights.notes)
    assert weights.aliases == {"out.weight": "embed.weight"}
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    model.load_state_dict(weights.state_dict())


def test_same_data_gives_the_same_bytes(network):
    one, two = (quantize(network, 3, data=images()).state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_shared_layer_is_solved_twice():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            for _ in range(3):
                x = torch.tanh(self.layer(x))
            return x

    torch.manual_seed(0)
    model, steps = Loop(), []
    targets = select(model).targets
    found = calibrate(
        model,
        targets,
        {"layer.weight": QuantSpec(3)},
        [torch.randn(16, 8)],
        {"layer.weight": "gptq"},
        progress=lambda name, done, total: steps.append((name, done, total)),
    )
    assert steps == [("layer.weight", 0, 2), ("layer.weight", 1, 2)]
    assert set(found.biases) == {"layer.bias"}


def test_too_large_second_moments_keep_their_diagonal(network):
    target = select(network).targets[-1]
    moments = observe((network, network), [target], images(), limit=1000)[target.name]
    assert moments.hessian.dim() == 2
    matrix = target.layout.fold(target.weight.detach())
    found = solve(matrix, QuantSpec(3), moments, centred=False)
    assert found.error <= found.rtn_error


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searched_ranges_lose_less_than_the_whole_range(bits):
    torch.manual_seed(0)
    layer = nn.Linear(256, 16)
    layer.weight.data.copy_(torch.randn(16, 256))
    errors = {
        method: (quantize_weights(layer, bits, method=method).state_dict()["weight"] - layer.weight)
        for method in ("rtn", "mse", "hqq")
    }
    sizes = {method: float(e.square().mean()) for method, e in errors.items()}
    assert sizes["mse"] < sizes["rtn"]
    assert float(errors["hqq"].abs().mean()) <= float(errors["rtn"].abs().mean())


def test_calibration_data_that_cannot_be_are_refused(network):
    def broken():
        yield torch.zeros(1)
        raise OSError("disk")

    def endless():
        while True:
            yield torch.zeros(1)

    with pytest.raises(ValueError, match="gave none"):
        calibration_data([], 4)
    with pytest.raises(RuntimeError, match="raised at batch 1: OSError: disk"):
        calibration_data(broken(), 4)
    assert len(calibration_data(endless(), 4)) == 4
    with pytest.raises(ValueError, match="calibrates on data"):
        quantize(network, 4, method="gptq")
    with pytest.raises(RuntimeError, match="calibration batch 0"):
        quantize(network, 4, data=[{"wrong": torch.zeros(1)}])


def test_activations_that_are_not_finite_name_the_layer(network):
    bad = [torch.full((1, 2, 8, 8), float("nan"))]
    with pytest.raises(ValueError, match=r"inputs of 0\.weight .* batch 0"):
        quantize_weights(network, 4, method="gptq", batches=bad)
