"""Other weights while a model runs: seen by all that is bound to it, and gone afterwards."""

import copy

import pytest
import torch
from torch import nn

from clipquant.quant.network.calibration import call_model
from clipquant.quant.network.twin import Twin, evaluating, twin_of


class Tied(nn.Module):
    """A decoder tied to an embedding, a closure over a layer, a recurrent layer and a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 4)
        self.cell = nn.LSTM(4, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.decode = nn.Linear(4, 9, bias=False)
        self.decode.weight = self.embed.weight
        self.again = lambda x: self.decode(x)

    def forward(self, ids):
        x = self.cell(self.embed(ids))[0]
        return self.again(self.norm(x.mT).mT)


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["embed.weight", "cell.weight_hh_l0", "norm.running_mean"])
def test_it_runs_as_a_model_that_was_loaded_with_the_tensors(name):
    model, ids = Tied().eval(), torch.randint(0, 9, (2, 5))
    before, kept = values(model), dict(model.named_parameters())
    other = before[name] + 1
    loaded = Tied().eval()
    loaded.load_state_dict(
        {
            **before,
            name: other,
            "decode.weight": other if name == "embed.weight" else before["decode.weight"],
        }
    )
    twin = Twin(model)
    twin.hold_({name: other})
    with torch.no_grad():
        assert torch.equal(twin.run(call_model, ids), loaded(ids))
        assert not torch.equal(model(ids), loaded(ids))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(kept[k] is p for k, p in model.named_parameters())
    twin.drop_([name])
    with torch.no_grad():
        assert torch.equal(twin.run(call_model, ids), model(ids))


def test_tensors_of_a_graph_take_part_in_it():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)), torch.randn(4, 3)
    scale = torch.ones((), requires_grad=True)
    twin = Twin(model)
    twin.hold_({"0.weight": model[0].weight.detach() * scale})
    (slope,) = torch.autograd.grad(twin.run(call_model, x).sum(), [scale])
    step = 1e-3
    with torch.no_grad():
        ends = []
        for factor in (1 + step, 1 - step):
            twin.hold_({"0.weight": model[0].weight.detach() * factor})
            ends.append(float(twin.run(call_model, x).sum()))
    assert float(slope) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-2)
    assert isinstance(model[0].weight, nn.Parameter)


def test_a_model_that_raises_has_its_own_weights_again():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    twin = Twin(model)
    twin.hold_({"weight": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError):
        twin.run(call_model, torch.zeros(1, 5))
    assert torch.equal(model.weight, before)


def test_a_compiled_part_sees_the_other_weights():
    model = nn.Linear(3, 2)
    fast = torch.compile(model, backend="eager")
    x = torch.randn(4, 3)
    twin = Twin(model)
    twin.hold_({"weight": torch.zeros(2, 3)})
    with torch.no_grad():
        first = fast(x)
        other = twin.run(lambda _model, batch: fast(batch), x)
        assert torch.equal(other, model.bias.expand(4, 2))
        assert torch.equal(fast(x), first)


def test_a_copy_shares_storage_but_neither_parameters_nor_buffers():
    model = Tied().train()
    copied = twin_of(model)
    assert model.training
    assert not copied.training
    assert copied.embed.weight is not model.embed.weight
    assert copied.embed.weight.data_ptr() == model.embed.weight.data_ptr()
    assert copied.decode.weight is copied.embed.weight
    copied.norm.running_mean.add_(1)
    assert float(model.norm.running_mean.sum()) == 0


def test_an_embedding_that_writes_its_weight_writes_its_own():
    model = nn.Embedding(5, 3, max_norm=0.1)
    before = model.weight.detach().clone()
    twin_of(model)(torch.arange(5))
    assert torch.equal(model.weight, before)


def test_what_cannot_be_copied_shares_its_attributes_alone():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
            self.lock = copy  # a module cannot be copied

        def forward(self, x):
            return self.norm(self.layer(x))

    model = Stubborn()
    copied = twin_of(model)
    assert copied.lock is copy
    assert copied.layer is not model.layer
    copied.layer.weight.data = torch.zeros(2, 2)
    copied.norm.running_mean.add_(1)
    assert model.layer.weight.abs().sum() > 0
    assert float(model.norm.running_mean.sum()) == 0


def test_eval_mode_is_for_a_while_and_for_every_part():
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    with evaluating(model):
        assert not any(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == [True, True, False]
