"""Learned rounding: nearer outputs, never a layer worse than plain rounding, for every kind of layer."""

import copy

import pytest
import torch
from torch import nn

from clipquant import quantize
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.codes.tensor import dequantize
from clipquant.quant.error.own_error import own_errors
from clipquant.quant.methods import AdaRound, Gptq, Mse, Problem
from clipquant.quant.methods.base import nearest, solved
from clipquant.quant.network.calibration import Calibration, call_model
from clipquant.quant.network.layers import select
from clipquant.quant.network.outputs import distance, outputs_of, tensors_of
from clipquant.quant.network.twin import Twin
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe


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


def _problem(model, batches, spec):
    targets = select(model).targets
    return Problem(model, targets, {t.name: spec for t in targets}, Calibration(batches))


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
        method: quantize_weights(model, Recipe(bits, method=method), Calibration(seen))
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
    problem = _problem(model, batches, QuantSpec(bits, granularity=granularity))
    start = nearest(problem, solved(Gptq(), problem), solved(Mse(), problem))
    found = AdaRound(steps=12).learned(problem, start)
    errors = own_errors(Twin(model), problem.targets, problem.specs, problem.data)
    for name, coded in found.codes.items():
        if found.methods[name] == "adaround":
            assert not errors[name].is_harmed(coded.values()), name
    twins = (Twin(model), problem.twin(start), problem.twin(found))
    outputs = [
        [[o.detach() for o in outputs_of(twin, b, call_model, "")] for b in batches]
        for twin in twins
    ]
    before, after = (
        sum(float(distance(o, w)) for o, w in zip(own, outputs[0], strict=True))
        for own in outputs[1:]
    )
    assert after <= before * (1 + 1e-6)
    assert all("distance" in " ".join(notes) for notes in found.notes.values())


def test_the_file_holds_the_network_that_was_judged():
    model, batches = Looped().eval(), _ids()
    problem = _problem(model, batches, QuantSpec(3))
    found = AdaRound(steps=40).learned(problem, solved(Mse(), problem))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with problem.twin(found).worn() as held:
        assert held is model
        for name in ("layer.weight", "embedding.weight"):
            assert torch.equal(held.get_parameter(name), found.codes[name].values())
        assert torch.equal(held.decoder.weight, held.embedding.weight)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_network_that_calibration_judges_by_is_the_one_that_is_saved():
    model, batches = Recurrent().eval(), _inputs(8, 5, 6)
    problem = _problem(model, batches, QuantSpec(2))
    judged = problem.twin(solved(Gptq(), problem))
    weights = quantize_weights(model, Recipe(2, method="gptq"), Calibration(batches))
    other = copy.deepcopy(model)
    other.load_state_dict(weights.state_dict())
    with torch.no_grad():
        outputs = judged.run(call_model, batches[0])
        assert torch.allclose(outputs, other(batches[0]), atol=1e-6)
        assert not torch.allclose(outputs, model(batches[0]), atol=1e-2)


def test_the_same_data_give_the_same_codes_and_the_model_is_not_touched():
    model, batches = Looped(), _ids()
    model.train()
    before = copy.deepcopy(model.state_dict())
    first, second = (
        quantize_weights(model, Recipe(2, method="adaround"), Calibration(batches)) for _ in "ab"
    )
    for name, tensor in first.tensors.items():
        assert torch.equal(dequantize(tensor), dequantize(second.tensors[name]))
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(first.floats[k], second.floats[k]) for k in first.floats)


def test_gradients_off_and_frozen_parameters_are_no_obstacle():
    model, batches = Looped().eval().requires_grad_(False), _ids()
    with torch.no_grad():
        weights = quantize_weights(model, Recipe(2, method="adaround"), Calibration(batches))
    plain = quantize_weights(model, Recipe(2, method="mse"))
    assert _apart(model, weights, batches) < _apart(model, plain, batches)


def test_auto_takes_plain_ranges_where_gptq_is_further_from_the_float_network():
    model, batches = Looped().eval(), _ids()
    found = {
        m: quantize_weights(model, Recipe(3, method=m), Calibration(batches))
        for m in ("mse", "gptq", "auto")
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
    mute = Twin(nn.Sequential(Mute(), nn.Identity()))
    found = outputs_of(mute, torch.zeros(2, 3).long(), call_model, "0.table")
    assert [t.shape for t in found] == [(2, 4)]
    with pytest.raises(TypeError, match="method='gptq'"):
        outputs_of(mute, torch.zeros(2, 3).long(), call_model, "1")


def test_it_needs_data():
    with pytest.raises(ValueError, match="method='adaround' calibrates on data; got none"):
        quantize(nn.Linear(4, 4), 2, method="adaround")
