"""GPTQ layer by layer: its errors against those measured on real outputs, for every kind of layer."""

import copy

import pytest
import torch
from torch import nn

from clipquant import quantize
from clipquant.quant.codes.grid import dequantize_rows, quantize_rows
from clipquant.quant.codes.ranges import minmax_grid, plain_rounding
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.codes.tensor import dequantize
from clipquant.quant.error.walk import gptq_codes, plan_walk
from clipquant.quant.methods import layerwise
from clipquant.quant.methods.gptq import Gptq, output_error_of
from clipquant.quant.methods.layerwise import Layer
from clipquant.quant.network.calibration import Calibration, calibration_data
from clipquant.quant.network.layers import select
from clipquant.quant.network.moments import observe
from clipquant.quant.network.replay import Replay
from clipquant.quant.network.twin import Twin
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(6, 5, batch_first=True)

    def forward(self, x):
        return self.cell(x)[0]


class Shared(nn.Module):
    """A layer run three times, and a decoder tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.block = nn.Linear(8, 8)
        self.decode = nn.Linear(8, 20)
        self.decode.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for _ in range(3):
            x = x + torch.tanh(self.block(x))
        return self.decode(x)


def images(*shape):
    return [torch.randn(16, *shape) for _ in range(4)]


KINDS = {
    "Linear": (lambda: nn.Linear(12, 6), lambda: images(12)),
    "Conv1d": (lambda: nn.Conv1d(3, 6, 3, padding=1, stride=2), lambda: images(3, 9)),
    "Conv2d": (lambda: nn.Conv2d(3, 6, 3, dilation=2), lambda: images(3, 9, 9)),
    "Conv2d grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), lambda: images(4, 7, 7)),
    "Conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), lambda: images(4, 7, 7)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2), lambda: images(2, 4, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), lambda: images(3, 7)),
    "ConvTranspose2d grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        lambda: images(4, 5, 5),
    ),
    "attention": (Attention, lambda: images(5, 8)),
    "LSTM": (lambda: Recurrent(nn.LSTM), lambda: images(7, 6)),
    "GRU": (lambda: Recurrent(nn.GRU), lambda: images(7, 6)),
    "shared and tied": (Shared, lambda: [torch.randint(0, 20, (8, 6)) for _ in range(4)]),
}


def output_error(model, weights, data):
    quantized = copy.deepcopy(model)
    quantized.load_state_dict(weights.state_dict())
    with torch.no_grad():
        return sum(float((quantized(x) - model(x)).square().sum()) for x in data)


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_lowers_the_output_error_of_every_kind_of_layer(kind):
    torch.manual_seed(0)
    make, draw = KINDS[kind]
    model, data = make(), draw()
    plain = quantize_weights(model, Recipe(3, method="rtn"))
    found = quantize_weights(model, Recipe(3, method="gptq"), Calibration(data))
    assert any(t.method == "gptq" for t in found.tensors.values())
    assert output_error(model, found, data) < output_error(model, plain, data)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 5])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d grouped", "ConvTranspose2d grouped"])
def test_no_layer_is_worse_than_rounding_on_what_it_was_shown(kind, bits, granularity):
    torch.manual_seed(1)
    make, draw = KINDS[kind]
    model, data = make(), draw()
    errors = {}
    for method in ("gptq", "rtn"):
        recipe = Recipe(bits, None, False, granularity, method)
        weights = quantize_weights(model, recipe, Calibration(data))
        errors[method] = centred_error(model, dequantize(weights.tensors["weight"]), data)
    assert errors["gptq"] <= errors["rtn"] * (1 + 1e-4) + 1e-12


def centred_error(layer, weight, data):
    """Return the squared error of a layer's outputs, without the mean that its bias can take up."""
    other = copy.deepcopy(layer)
    other.weight.data = weight
    with torch.no_grad():
        off = torch.cat([other(x) - layer(x) for x in data]).double()
    channels = off.movedim(1, -1).reshape(-1, off.shape[1]) if off.dim() > 2 else off
    return float((channels - channels.mean(0)).square().mean(0).sum())


def test_the_error_by_moments_is_that_of_the_layers_outputs():
    torch.manual_seed(2)
    layer, data = nn.Linear(10, 4), images(10)
    target = select(layer).targets[0]
    moments = observe((Twin(layer),) * 2, [target], Calibration(data))[target.name]
    matrix, spec = layer.weight.detach(), QuantSpec(2)
    error = output_error_of(moments, 0, False)
    x = torch.cat(data)
    rtn, (gptq, method) = (
        plain_rounding(matrix, spec),
        Gptq().code(Layer(matrix, spec, moments, False)),
    )
    for coded in (rtn, gptq):
        measured = (x @ (coded.values() - matrix).T).square().mean(0)
        assert torch.allclose(error.of(coded), measured, rtol=1e-3)
    assert method == "gptq"
    assert (error.of(gptq) <= error.of(rtn) * (1 + 1e-6)).all()


def test_the_walk_is_that_of_the_paper():
    """Columns one by one, the error spread by the inverse Hessian, as 2210.17323 has it: in float64."""
    torch.manual_seed(3)
    w, x = torch.randn(4, 7), torch.randn(50, 7)
    layer = nn.Linear(7, 4, bias=False)
    layer.weight.data = w
    target = select(layer).targets[0]
    moments = observe((Twin(layer),) * 2, [target], Calibration([x]))[target.name]
    error = output_error_of(moments, 0, False).damped(w, 0.01)
    walk = plan_walk(error)
    grid = minmax_grid(w, QuantSpec(3))

    hessian = (x.T @ x / 50).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    order = hessian.diagonal().argsort(descending=True)
    rest, codes = w.double().clone(), torch.zeros(4, 7, dtype=torch.uint8)
    left = order.tolist()
    while left:
        j = left[0]
        inverse = torch.linalg.inv(hessian[left][:, left])
        one = quantize_rows(rest[:, j : j + 1].float(), grid)
        codes[:, j] = one[:, 0]
        off = (rest[:, j] - dequantize_rows(one, grid)[:, 0].double()) / inverse[0, 0]
        rest[:, left] -= off[:, None] * inverse[0][None]
        left = left[1:]
    ours = gptq_codes(walk, grid).codes
    assert (ours == codes).float().mean() > 0.95  # float32 may tip a code that stands between two


def test_a_layer_never_reached_is_quantized_without_data_and_says_so():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.used(x)

    weights = quantize_weights(Half(), Recipe(3, method="gptq"), Calibration(images(6)))
    assert weights.tensors["idle.weight"].method == "mse"
    assert "never reach this layer" in weights.notes["idle.weight"]


def test_inputs_that_are_not_finite_are_refused_by_layer_and_batch():
    data = images(12)
    data[2][0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"inputs of weight hold NaN or infinity in .* batch 2"):
        quantize_weights(nn.Linear(12, 6), Recipe(3, method="gptq"), Calibration(data))


def test_a_batch_that_the_model_cannot_take_is_named():
    with pytest.raises(RuntimeError, match=r"could not run on calibration batch 0 \(Tensor\)"):
        quantize_weights(
            nn.Linear(12, 6), Recipe(3, method="gptq"), Calibration([torch.zeros(2, 5)])
        )


def test_dead_inputs_and_zero_channels_are_no_obstacle():
    torch.manual_seed(4)
    layer, data = nn.Linear(12, 6), images(12)
    layer.weight.data[2] = 0
    for x in data:
        x[:, 5] = 0
    weights = quantize_weights(layer, Recipe(2, method="gptq"), Calibration(data))
    values = dequantize(weights.tensors["weight"])
    assert torch.equal(values[2], torch.zeros(12))
    assert values.isfinite().all()


def test_the_same_data_give_the_same_bytes_and_the_model_is_not_touched():
    torch.manual_seed(5)
    model, data = KINDS["shared and tied"][0](), KINDS["shared and tied"][1]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    one, two = (
        quantize_weights(model, Recipe(3, method="gptq"), Calibration(data)) for _ in range(2)
    )
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor.codes, two.tensors[name].codes)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.decode.weight is model.embed.weight


@pytest.mark.parametrize("method", ["mse", "hqq"])
@pytest.mark.parametrize("bits", [2, 3])
def test_data_free_ranges_lower_the_weights_own_error(method, bits):
    torch.manual_seed(6)
    layer = nn.Linear(64, 32)
    layer.weight.data = torch.distributions.StudentT(3.0).sample((32, 64))
    errors = {}
    for name in ("rtn", method):
        values = dequantize(quantize_weights(layer, Recipe(bits, method=name)).tensors["weight"])
        power = 2 if method == "mse" else 0.7  # what the method minimizes
        errors[name] = float((values - layer.weight.detach()).abs().pow(power).sum())
    assert errors[method] < errors["rtn"]


def test_calibration_without_data_is_refused():
    with pytest.raises(ValueError, match="method='gptq' calibrates on data; got none"):
        quantize_weights(nn.Linear(4, 4), Recipe(4, method="gptq"))
    with pytest.raises(ValueError, match="the data gave none"):
        calibration_data([], 4)
    with pytest.raises(RuntimeError, match="raised at batch 1: KeyError"):
        calibration_data((x or {}["gone"] for x in [1, 0]), 4)


class Shares(nn.Module):
    """A query that all samples share goes through layers of its own."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.query = nn.Parameter(torch.randn(1, 16))
        self.context = nn.Sequential(nn.Linear(16, 16), nn.ELU(), nn.Linear(16, 16))
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x):
        return self.head(torch.relu(self.body(x) + self.context(self.query.expand(len(x), -1))))


@pytest.mark.parametrize(
    "asked", [{"bits": 4, "method": "gptq"}, {"bits": "auto", "max_size": 3000}]
)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_layers_whose_inputs_are_constant_are_no_obstacle(asked, scale):
    for seed in range(4):
        model = Shares(seed)
        with torch.no_grad():
            model.query *= scale
        data = [torch.randn(150, 8) for _ in range(3)]
        made = quantize(model, data=data, progress=False, **asked)
        assert all(v.isfinite().all() for v in made.state_dict().values())
        x = torch.randn(64, 8)
        with torch.no_grad():
            off = made.apply_to(Shares(seed))(x) - model(x)
        assert float(off.abs().max()) < 0.2 * float(model(x).std()) + 0.02 * scale


class Residual(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width)
            )
            for _ in range(4)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def test_layers_fitted_in_one_pass_do_not_make_up_for_the_same_errors_twice(monkeypatch):
    torch.manual_seed(0)
    net, data = Residual().eval(), [torch.randn(48, 24) @ torch.randn(24, 24) for _ in range(6)]

    def error(method):
        found = quantize_weights(net, Recipe(3, None, None, "channel", method), Calibration(data))
        return output_error(net, found, data)

    plain, one_by_one = error("mse"), error("gptq")
    monkeypatch.setattr(layerwise, "parts_of", lambda *_: Replay([], {}))
    monkeypatch.setattr(layerwise, "MOST_PASSES", 2)
    together = error("gptq")
    assert one_by_one < together < plain
