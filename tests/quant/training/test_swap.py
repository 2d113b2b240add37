"""Layers of swapped classes: every kind computes with its weights on a grid, and is itself again afterwards."""

import copy
import pickle

import pytest
import torch
from torch import nn

from clipquant.errors import ArgumentTypeError
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.network.layers import select
from clipquant.quant.training.learned_grid import LearnedGrid, first_grid
from clipquant.quant.training.swap import fake_quant_class, is_on, put_on, take_off

X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


class Own(nn.Linear):
    """A user's own layer, whose forward reads its weight twice."""

    def forward(self, x, *, gain=1.0):
        return (x @ self.weight.T * gain + (x @ self.weight.T).tanh()) @ self.weight


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.out = nn.Linear(6, 5, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        return self.out(self.table((x.abs().sum(-1) * 3).long() % 5))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 3), X),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), X),
    "conv2d": (lambda: nn.Conv2d(2, 6, 3, groups=2), X[None]),
    "conv3d": (lambda: nn.Conv3d(1, 4, 2), X[None, None]),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), X),
    "transposed2d": (lambda: nn.ConvTranspose2d(2, 3, 3), X[None]),
    "transposed3d": (lambda: nn.ConvTranspose3d(1, 2, 2), X[None, None]),
    "embedding": (lambda: nn.Embedding(9, 5), torch.arange(8)),
    "embedding_bag": (lambda: nn.EmbeddingBag(9, 5), torch.arange(8).reshape(2, 4)),
    "attention": (lambda: nn.MultiheadAttention(6, 2, batch_first=True), (X, X, X)),
    "attention_of_other_sizes": (lambda: nn.MultiheadAttention(6, 2, kdim=6, vdim=6), (X, X, X)),
    "encoder": (lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), X),
    "lstm": (lambda: nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True, proj_size=3), X),
    "gru": (lambda: nn.GRU(6, 5, batch_first=True), X),
    "rnn": (lambda: nn.RNN(6, 5, bias=False), X),
    "lstm_cell": (lambda: nn.LSTMCell(6, 5), X[0]),
    "gru_cell": (lambda: nn.GRUCell(6, 5), X[0]),
    "own": (lambda: Own(6, 6), X),
    "tied": (Tied, X),
}


def grids_of(model, spec=None):
    spec = spec or QuantSpec(2)
    return {
        t.name: LearnedGrid.of(first_grid(t.weight, t.layout, spec)) for t in select(model).targets
    }


def run(model, inputs):
    out = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_computes_with_its_weights_on_the_grid(kind, training):
    make, inputs = LAYERS[kind]
    torch.manual_seed(1)
    model = make().train(training)
    plain, grids = copy.deepcopy(model), grids_of(model)
    own_kinds, keys = [type(m) for m in model.modules()], list(model.state_dict())
    ids = [id(p) for p in model.parameters()]
    held = {name: grid.fake(plain.get_parameter(name)).detach() for name, grid in grids.items()}
    plain.load_state_dict(held, strict=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    put_on(model, grids)
    assert is_on(model)
    seen = run(model, inputs)
    torch.testing.assert_close(seen, run(plain, inputs), rtol=0, atol=1e-6)
    seen.square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in grids)
    assert any(float(grid.stretch.grad.abs().sum()) > 0 for grid in grids.values())
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == ids
    take_off(model)
    assert [type(m) for m in model.modules()] == own_kinds
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    with torch.no_grad():
        assert not torch.equal(run(model, inputs), seen)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "attention", "lstm", "tied"])
def test_copies_and_pickles_are_swapped_too_and_independent(kind):
    make, inputs = LAYERS[kind]
    model = make()
    put_on(model, grids_of(model))
    expected = run(model, inputs)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(run(again, inputs), expected)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.zero_()
        assert torch.equal(run(model, inputs), expected)


def test_keyword_arguments_and_loading_by_assignment():
    model = Own(6, 6)
    put_on(model, grids_of(model))
    assert not torch.equal(model(X, gain=2.0), model(X))
    other = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(other, assign=True)
    assert torch.equal(model._parameters["weight"], other["weight"])
    assert not torch.equal(model.weight, other["weight"])


def test_moving_and_casting_a_recurrent_layer_keeps_it_swapped():
    model = nn.LSTM(6, 5)
    put_on(model, grids_of(model))
    model.double()
    out = model(X.double())[0]
    out.sum().backward()
    take_off(model)
    assert model(X.double())[0].dtype is torch.float64
    assert not torch.equal(model(X.double())[0], out)


def test_a_class_is_made_once():
    assert fake_quant_class(nn.Linear, ("weight",)) is fake_quant_class(nn.Linear, ("weight",))


def test_a_class_that_cannot_be_swapped_is_named():
    class Slotted(nn.Linear):
        __slots__ = ("extra",)

        def __init_subclass__(cls):
            raise TypeError("final")

    model = Slotted(2, 2)
    with pytest.raises(ArgumentTypeError, match="Slotted is not"):
        put_on(model, grids_of(model))
