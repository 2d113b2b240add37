"""Learned rounding: nearer outputs, never a layer worse than plain rounding, for every kind of layer."""

import copy

import pytest
import torch
from torch import nn

from clipquant import quantize
from clipquant.quant.codes.grid import dequantize_rows
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.codes.tensor import dequantize
from clipquant.quant.methods.adaround import adaround
from clipquant.quant.methods.auto import data_free, nearest
from clipquant.quant.methods.layerwise import calibrate
from clipquant.quant.network.calibration import call_model
from clipquant.quant.network.layers import select
from clipquant.quant.network.outputs import distance, outputs_of, tensors_of
from clipquant.quant.quantize import quantize_weights


class Looped(nn.Module):
    """A layer that feeds itself eight times, between an embedding and a decoder tied to it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 16)
        self.layer = nn.Linear(16, 16)
        self.decoder = nn.Linear(16, 20, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        for _ in range(8):
            x = nn.functional.layer_norm(x + torch.tanh(self.layer(x)), (16,))
        return {"logits": self.decoder(x)}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


def _ids(count=6):
    torch.manual_seed(1)
    return [torch.randint(0, 20, (16, 5)) for _ in range(count)]


def _inputs(*shape, count=4):
    torch.manual_seed(1)
    return [torch.randn(shape) for _ in range(count)]


def _apart(model, weights, batches):
    other = copy.deepcopy(model)
    other.load_state_dict(weights.state_dict())
    with torch.no_grad():
        parts = [
            float(
                distance(
                    list(tensors_of(call_model(other, b))), list(tensors_of(call_model(model, b)))
                )
            )
            for b in batches
        ]
    return sum(parts) / len(parts)


@pytest.mark.parametrize("bits", [2, 3])
def test_a_layer_that_feeds_itself_gains_most(bits):
    model, batches = Looped().eval(), _ids(12)
    seen, fresh = batches[:8], batches[8:]
    found = {
        method: quantize_weights(model, bits, method=method, batches=seen)
        for method in ("rtn", "mse", "gptq", "adaround")
    }
    apart = {method: _apart(model, weights, fresh) for method, weights in found.items()}
    assert apart["adaround"] < 0.8 * min(apart["rtn"], apart["mse"], apart["gptq"])
    assert {t.method for t in found["adaround"].tensors.values()} <= {"adaround", "gptq", "mse"}


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (Looped(), _ids()),
        (Recurrent(), _inputs(8, 5, 6)),
        (Attention(), _inputs(8, 5, 8)),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), _inputs(4, 2, 8, 8)),
        (nn.Sequential(nn.ConvTranspose1d(4, 2, 3, groups=2)), _inputs(4, 4, 9)),
    ],
)
@pytest.mark.parametrize(("bits", "granularity"), [(2, "channel"), (4, 5), (8, "tensor")])
def test_no_layer_is_worse_than_plain_rounding_nor_the_outputs_than_before(
    model, batches, bits, granularity
):
    model = model.eval()
    targets = select(model).targets
    specs = {t.name: QuantSpec(bits, granularity=granularity) for t in targets}
    starts = (calibrate(model, targets, specs, batches), data_free(model, targets, specs, {}))
    start = nearest(model, starts, targets, batches)
    found = adaround(model, targets, specs, start, batches, steps=12)
    for name, solution in found.solutions.items():
        assert solution.error <= solution.rtn_error * (1 + 1e-6), name
    outputs = [
        [[o.detach() for o in outputs_of(net, b, call_model, net)] for b in batches]
        for net in (model, start.model, found.model)
    ]
    before, after = (
        sum(float(distance(o, w)) for o, w in zip(own, outputs[0], strict=True))
        for own in outputs[1:]
    )
    assert after <= before * (1 + 1e-6)
    assert all("distance" in " ".join(notes) for notes in found.notes.values())


def test_the_file_holds_the_network_that_was_judged():
    model, batches = Looped().eval(), _ids()
    targets = select(model).targets
    specs = {t.name: QuantSpec(3) for t in targets}
    start = data_free(model, targets, specs, {})
    found = adaround(model, targets, specs, start, batches, steps=40)
    name = "layer.weight"
    held = found.model.get_parameter(name)
    layout = {t.name: t.layout for t in targets}[name]
    solution = found.solutions[name]
    assert found.model.decoder.weight is found.model.embedding.weight
    assert torch.equal(held, layout.unfold(dequantize_rows(solution.codes, solution.grid)))


def test_the_network_that_calibration_judges_by_is_the_one_that_is_saved():
    model, batches = Recurrent().eval(), _inputs(8, 5, 6)
    targets = select(model).targets
    specs = {t.name: QuantSpec(2) for t in targets}
    found = calibrate(model, targets, specs, batches)
    weights = quantize_weights(model, 2, method="gptq", batches=batches)
    other = copy.deepcopy(model)
    other.load_state_dict(weights.state_dict())
    with torch.no_grad():
        assert torch.allclose(found.model(batches[0]), other(batches[0]), atol=1e-6)
        assert not torch.allclose(found.model(batches[0]), model(batches[0]), atol=1e-2)


def test_the_same_data_give_the_same_codes_and_the_model_is_not_touched():
    model, batches = Looped(), _ids()
    model.train()
    before = copy.deepcopy(model.state_dict())
    first, second = (quantize_weights(model, 2, method="adaround", batches=batches) for _ in "ab")
    for name, tensor in first.tensors.items():
        assert torch.equal(dequantize(tensor), dequantize(second.tensors[name]))
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(first.floats[k], second.floats[k]) for k in first.floats)


def test_gradients_off_and_frozen_parameters_are_no_obstacle():
    model, batches = Looped().eval().requires_grad_(False), _ids()
    with torch.no_grad():
        weights = quantize_weights(model, 2, method="adaround", batches=batches)
    plain = quantize_weights(model, 2, method="mse")
    assert _apart(model, weights, batches) < _apart(model, plain, batches)


def test_auto_takes_plain_ranges_where_gptq_is_further_from_the_float_network():
    model, batches = Looped().eval(), _ids()
    found = {
        m: quantize_weights(model, 3, method=m, batches=batches) for m in ("mse", "gptq", "auto")
    }
    apart = {m: _apart(model, w, batches) for m, w in found.items()}
    assert apart["auto"] == pytest.approx(min(apart["mse"], apart["gptq"]), rel=1e-4)


def test_outputs_without_a_floating_tensor_are_refused():
    class Mute(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.EmbeddingBag(4, 4)

        def forward(self, x):
            return self.table(x).argmax(1)

    # The layer's own outputs stand in for those of the model.
    found = outputs_of(mute := Mute(), torch.zeros(2, 3).long(), call_model, mute.table)
    assert [t.shape for t in found] == [(2, 4)]
    with pytest.raises(TypeError, match="method='gptq'"):
        outputs_of(mute, torch.zeros(2, 3).long(), call_model, nn.Identity())


def test_it_needs_data():
    with pytest.raises(ValueError, match="method='adaround' calibrates on data; got none"):
        quantize(nn.Linear(4, 4), 2, method="adaround")
