"""A float network beside the one that is trained: its loss joins one backward pass, and moves nothing else."""

import copy

import pytest
import torch
from torch import nn

from clipquant.quant.network.wanted import are_logits, loss_of
from clipquant.quant.training.tutor import Tutor

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x, *, scale=1.0):
        return {"logits": self.head(self.body(x).relu()) * scale, "loss": self.head.weight.sum()}


def pair():
    torch.manual_seed(0)
    teacher = Net()
    pupil = copy.deepcopy(teacher)
    with torch.no_grad():
        pupil.body.weight.mul_(1.3)
    return pupil, teacher


def test_one_backward_pass_gives_the_gradients_of_both_losses():
    pupil, teacher = pair()
    out, wanted = pupil(X, scale=2.0), teacher(X, scale=2.0)["logits"].detach()
    own = out["logits"].square().mean()
    beside = loss_of([out["logits"]], [wanted], [are_logits(wanted)], "auto")
    expected = torch.autograd.grad(own + 0.25 * 4 * beside, list(pupil.parameters()))
    tutor = Tutor(teacher, 0.25)
    tutor.attach_(pupil)
    tutor.weigh(4.0)
    pupil(X, scale=2.0)["logits"].square().mean().backward()
    for slope, parameter in zip(expected, pupil.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, slope)
    assert all(p.grad is None for p in teacher.parameters())


def test_parts_that_a_step_calls_are_taught_by_themselves():
    pupil, teacher = pair()
    tutor = Tutor(teacher, 1.0)
    tutor.attach_(pupil)
    tutor.weigh(1.0)
    hidden = pupil.body(X).relu()
    (0 * pupil.head(hidden)).sum().backward()
    assert float(pupil.body.weight.grad.abs().sum()) > 0  # 0 times the step's own loss
    assert set(tutor.kinds) == {"body", "head"}


def test_nothing_is_taught_in_eval_mode_or_without_gradients_or_afterwards():
    pupil, teacher = pair()
    tutor = Tutor(teacher, 1.0)
    tutor.attach_(pupil)
    pupil.eval()(X)
    with torch.no_grad():
        pupil.train()(X)
    tutor.detach_()
    pupil(X)
    assert tutor.kinds == {}
    assert not pupil._forward_hooks
    assert not pupil._forward_pre_hooks


def test_a_forward_that_fails_is_forgotten_with_the_next_batch():
    pupil, teacher = pair()
    tutor = Tutor(teacher, 1.0)
    tutor.attach_(pupil)
    with pytest.raises(TypeError):
        pupil("no tensor")
    tutor.weigh(1.0)
    pupil(X)
    assert set(tutor.kinds) == {""}


def test_a_state_brings_the_network_back():
    pupil, teacher = pair()
    other = Tutor(Net(), 1.0)
    other.load_state_dict(Tutor(teacher, 1.0).state_dict())
    assert torch.equal(other.teacher(X)["logits"], teacher(X)["logits"])
