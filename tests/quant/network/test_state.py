"""Whatever running a model writes is put back; the same random numbers are drawn each time."""

import random
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from clipquant.quant.network.state import Trace, kept, seeded


class Tracker:
    def __init__(self):
        self.seen = []


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.mean = MeanMetric()
        self.held = {"list": [1], "set": {1}, "queue": deque([1]), "array": np.zeros(2)}
        self.tracker = Tracker()
        self.plain = torch.zeros(2)
        self.draws = np.random.default_rng(0)
        self.more = random.Random(0)
        self.torch_draws = torch.Generator().manual_seed(0)


WRITES = {
    "buffer": lambda m: m.norm(torch.randn(4, 2)),
    "metric": lambda m: m.mean.update(3.0),
    "mode": lambda m: m.eval(),
    "attribute": lambda m: setattr(m, "new", 1),
    "module": lambda m: setattr(m, "new", nn.Linear(1, 1)),
    "list": lambda m: m.held["list"].append(2),
    "dict": lambda m: m.held.update(new=[2]),
    "set": lambda m: m.held["set"].add(2),
    "deque": lambda m: m.held["queue"].append(2),
    "object": lambda m: m.tracker.seen.append(2),
    "object's attribute": lambda m: setattr(m.tracker, "more", 2),
    "tensor": lambda m: m.plain.add_(1),
    "hook": lambda m: m.layer.register_forward_hook(lambda *_: None),
    "parameter": lambda m: m.layer._parameters.update(weight=nn.Parameter(torch.zeros(2, 2))),
}
UNSEEN = {
    "array": lambda m: m.held["array"].__iadd__(1),
    "numpy": lambda m: m.draws.random(),
    "random": lambda m: m.more.random(),
    "generator": lambda m: torch.rand(1, generator=m.torch_draws),
}


def look(model):
    return (
        {k: v.tolist() for k, v in model.state_dict().items()}, float(model.mean.mean_value),
        [m.training for m in model.modules()], [sorted(vars(m)) for m in model.modules()],
        {k: list(v) for k, v in model.held.items()}, vars(model.tracker).copy(),
        list(model.tracker.seen), model.plain.tolist(), str(model.draws.bit_generator.state),
        model.more.getstate(), model.torch_draws.get_state().tolist(),
        len(model.layer._forward_hooks), id(model.layer.weight),
    )  # fmt: skip


@pytest.mark.parametrize("name", [*WRITES, *UNSEEN])
def test_every_kind_of_write_is_put_back(name):
    model = Model()
    before = look(model)
    with kept(model):
        (WRITES | UNSEEN)[name](model)
        assert look(model) != before
    assert look(model) == before


@pytest.mark.parametrize("name", WRITES)
def test_every_kind_of_write_is_noticed(name):
    model = Model()
    trace = Trace(model)
    assert not trace.changed()
    WRITES[name](model)
    assert trace.changed()


def test_it_is_put_back_where_the_step_raises():
    model = Model()
    before = look(model)
    with pytest.raises(ZeroDivisionError), kept(model):
        model.held["list"].append(1 / 0 if model.held["list"].append(2) is None else 0)
    assert look(model) == before


def test_values_of_parameters_are_put_back_where_it_is_asked_for():
    model = Model()
    value, tensor = model.layer.weight.detach().clone(), model.layer.weight.data
    with kept(model, parameters=True), torch.no_grad():
        model.layer.weight.add_(1)
        model.layer.weight.data = torch.zeros(2, 2)
    assert torch.equal(model.layer.weight, value)
    assert model.layer.weight.data_ptr() == tensor.data_ptr()


def test_inference_tensors_are_no_obstacle():
    model = Model()
    with torch.inference_mode():
        model.cache = torch.ones(2)
    with kept(model):
        model.cache = None
    assert model.cache.tolist() == [1, 1]


def draws():
    # numpy's global generator, which user code draws from
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()  # noqa: NPY002


def start():
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)


def test_the_same_numbers_are_drawn_and_the_states_are_left():
    before = draws()
    start()
    with seeded(3):
        first = draws()
    with seeded(3):
        assert draws() == first
    after = draws()
    start()
    assert draws() == after != before
