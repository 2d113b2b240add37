"""Sensitivities of few samples: chance between rows is drawn towards their mean, real differences stay."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from clipquant import quantize
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.layers import select
from clipquant.quant.widths.sensitivity import (
    believed,
    believed_gradients,
    squared_gradients,
    with_unseen,
)


def collected(parts):
    """Return the mean of each row's sum and of its square, from (pieces, rows, columns)."""
    return parts.mean(0), parts.double().sum(2).square().mean(0), len(parts)


def test_rows_that_differ_by_chance_alone_become_alike():
    torch.manual_seed(0)
    parts = torch.zeros(16, 300, 4)
    parts[torch.arange(16).repeat_interleave(4), torch.randint(0, 300, (64,))] = 1.0
    rows = believed(*collected(parts), 64).sum(1)
    assert rows.min() > 0.7 * rows.mean()


def test_rows_that_differ_in_truth_stay_apart():
    torch.manual_seed(0)
    size = torch.logspace(-2, 2, 30)
    parts = size[:, None] * (1 + 0.1 * torch.rand(16, 30, 4))
    fisher, square, pieces = collected(parts)
    assert torch.allclose(believed(fisher, square, pieces, 10**7), fisher, rtol=0.05)


def test_the_mean_of_all_rows_stays_and_counts_as_64_samples():
    torch.manual_seed(0)
    fisher, square, pieces = collected(torch.rand(5, 20, 3))
    assert torch.allclose(believed(fisher, square, pieces, 9).mean(0), fisher.mean(0))
    halfway = (fisher + fisher.mean(0)) / 2
    assert torch.allclose(believed(fisher, square, 1, 64), halfway)  # one piece alone
    assert torch.allclose(believed(fisher, fisher.sum(1) ** 2, 5, 64), halfway)  # all pieces alike


def test_a_row_of_a_lookup_that_nobody_asks_for_counts_as_one_look():
    torch.manual_seed(0)
    looks = torch.tensor([0, 0, 1, 1, 1, 1, 2, 9])
    fisher = looks[:, None] * torch.ones(8, 3)
    assert torch.equal(with_unseen(fisher), fisher + 1)
    assert torch.equal(with_unseen(fisher * 0), fisher * 0)


def net_of(quantized, net):
    return quantized.apply_to(copy.deepcopy(net)).eval()


def test_unseen_classes_keep_their_bits():
    torch.manual_seed(0)
    centres, net = (
        torch.randn(120, 16) * 1.5,
        nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 120)),
    )
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(250):
        y = torch.randint(0, 120, (256,))
        loss = F.cross_entropy(net(centres[y] + 0.5 * torch.randn(256, 16)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    labels = [torch.randint(0, 120, (4,)) for _ in range(8)]
    data = [centres[y] + 0.5 * torch.randn(4, 16) for y in labels]
    unseen = ~torch.isin(torch.arange(120), torch.cat(labels))
    y = torch.randint(0, 120, (2000,))
    x = centres[y] + 0.5 * torch.randn(2000, 16)
    for few in (data, [torch.cat(data)]):
        plain = quantize(net, 2, data=few, progress=False)
        # What a search leaves free for its own report does not count against it.
        made = quantize(
            net, "auto", max_size=plain.report.size_bytes + 1100, data=few, progress=False
        )
        bits = made.weights.tensors["2.weight"].bits.float()
        hits = [float((net_of(q, net)(x).argmax(1) == y).float().mean()) for q in (plain, made)]
        assert hits[1] >= hits[0] - 0.03
        assert bits[unseen].mean() > 0.8 * bits[~unseen].mean()
        rest = unseen[y]  # inputs of classes that nothing was fitted to
        off = [
            float((net_of(q, net)(x[rest]) - net(x[rest])).square().sum()) for q in (plain, made)
        ]
        assert off[1] < 1.25 * off[0]


def test_tables_are_as_they_were_seen():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)).eval()
    targets, data = select(net).targets, Calibration([torch.randint(0, 5, (6,)) for _ in range(4)])

    def loss(model, batch):
        return model(batch).logsumexp(1).mean(), len(batch)

    plain, drawn = (f(net, targets, data, loss) for f in (squared_gradients, believed_gradients))
    assert torch.equal(plain["0.weight"], drawn["0.weight"])
    assert not drawn["0.weight"][5:].any()
