"""BatchNorm statistics that follow the weights: against each layer's own measured means and variances."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clipquant import quantize
from clipquant.quant.network.batchnorm import batch_norms, reestimate
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.twin import Twin


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )
    images = torch.randn(512, 2, 8, 8) + 0.3 * torch.randn(512, 1, 1, 1)
    goal = images.mean((2, 3)) @ torch.randn(2, 4)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        pick = torch.randint(0, 512, (64,))
        loss = nn.functional.mse_loss(net(images[pick]), goal[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval(), images.split(64)


def _distance(net, other, images):
    with torch.no_grad():
        return float((net(images) - other(images)).square().mean())


def test_equal_weights_keep_their_statistics(trained):
    net, batches = trained
    same = Twin(net)
    same.hold_({"0.weight": net[0].weight.detach().clone()})
    assert reestimate(Twin(net), same, Calibration(batches)) == {}


@settings(max_examples=15)
@given(st.floats(0.5, 2.0), st.floats(-1.0, 1.0))
def test_a_scaled_and_shifted_input_is_made_up_for_exactly(factor, offset):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)).eval()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    batches = [torch.randn(16, 3, 5) for _ in range(3)]
    mean = torch.cat([net[0](b) for b in batches]).mean((0, 2)).detach()
    net[1].running_mean.copy_(mean)
    other = Twin(net)
    weight, bias = (p.detach() for p in net[0].parameters())
    other.hold_({"0.weight": weight * factor, "0.bias": bias * factor + offset})

    def distance():
        with torch.no_grad(), other.worn():
            ours = net(torch.cat(batches))
        return float((ours - net(torch.cat(batches))).square().mean())

    before = distance()
    reestimate(Twin(net), other, Calibration(batches))
    assert distance() <= before * 1e-3 + 1e-4


def test_the_statistics_are_those_of_the_quantized_networks_own_inputs(trained):
    net, batches = trained
    state = quantize(net, 2, method="rtn").state_dict()
    other, rounded = copy.deepcopy(net), Twin(net)
    other.load_state_dict(state)
    rounded.hold_({name: state[name] for name in ("0.weight", "3.weight", "7.weight")})
    new = reestimate(Twin(net), rounded, Calibration(batches))
    with torch.no_grad():
        ours, theirs = (torch.cat([n[0](b) for b in batches]) for n in (other, net))
    moved = ours.mean((0, 2, 3)) - theirs.mean((0, 2, 3))
    assert torch.allclose(new["1.running_mean"], net[1].running_mean + moved, atol=1e-5)


def test_quantizing_with_data_re_estimates_and_says_so(trained):
    net, batches = trained
    alone = quantize(net, 2, method="rtn")
    found = quantize(net, 2, method="rtn", data=batches)
    images = torch.cat(batches)
    errors = [_distance(net, q.apply_to(copy.deepcopy(net)), images) for q in (alone, found)]
    assert errors[1] < 0.8 * errors[0]
    why = {item.name: item.why for item in found.report.left}
    assert "re-estimated" in why["1.running_mean"]
    assert "re-estimated" in why["4.running_var"]
    assert "vector" in why["1.bias"]


def test_the_float_network_keeps_its_own(trained):
    net, batches = trained
    before = copy.deepcopy(net.state_dict())
    quantize(net, 2, method="rtn", data=batches)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_layers_without_running_statistics_are_left_alone():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    assert batch_norms(net) == {}
    quantize(net, 4, method="rtn", data=[torch.randn(8, 4)])
