"""What one pass decides another follows: symbols, routes and draws, in order, and only where both go one way."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clipquant import quantize
from clipquant.quant.network.decisions import Decisions

SCORES = torch.tensor([[0.1, 3.0, 2.0], [5.0, 4.0, -1.0]])
CHOICES = {
    "argmax": lambda x: x.argmax(1),
    "argmin": lambda x: x.argmin(1),
    "max": lambda x: torch.stack([part.float() for part in x.max(1)]),
    "topk": lambda x: torch.stack([part.float() for part in x.topk(2)]),
    "topk of a dimension": lambda x: torch.stack([part.float() for part in x.topk(1, 0)]),
    "sort": lambda x: torch.stack([part.float() for part in x.sort(1)]),
    "stable sort": lambda x: torch.stack([p.float() for p in x.sort(dim=1, stable=True)]),
    "argsort": lambda x: x.argsort(1),
    "multinomial": lambda x: torch.multinomial(x.softmax(1), 2),
}


@pytest.mark.parametrize("name", CHOICES)
def test_another_pass_makes_the_same_choices_with_its_own_numbers(name):
    torch.manual_seed(0)
    choose, taken = CHOICES[name], Decisions()
    with taken.recorded():
        first = choose(SCORES)
    with taken.followed():
        again = choose(-2 * SCORES)
    assert again.shape == first.shape
    if first.is_floating_point():  # values beside the choice: the other pass's own
        assert torch.equal(again[1], first[1])
        dim = 0 if name.endswith("dimension") else 1
        index = first[1].long()
        picked = (-2 * SCORES).gather(dim, index if index.dim() == 2 else index[:, None])
        assert torch.equal(again[0], picked.reshape(again[0].shape))
    else:
        assert torch.equal(again, first)


def test_numbers_that_are_whole_choose_for_themselves():
    taken = Decisions()
    with taken.recorded():
        torch.tensor([1, 2]).argmax()
    with taken.followed():
        assert torch.tensor([2, 1]).argmax() == 0


def test_a_pass_that_goes_another_way_is_left_to_it():
    taken = Decisions()
    with taken.recorded():
        SCORES.argmax(1)
    with taken.followed():
        assert SCORES.argmax() == 3  # another shape: from here on its own choices
        assert (-SCORES).argmax(1).tolist() == [0, 2]


class Decoder(nn.Module):
    """Reads its own last symbol."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.cell, self.head = (
            nn.Embedding(13, 24),
            nn.GRUCell(24, 24),
            nn.Linear(24, 12),
        )
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=0.02 if "bias" in name else 0.35)
        nn.init.normal_(self.embed.weight)

    def forward(self, start, fed=None):
        state, last, out = start, torch.full((len(start),), 12), []
        for step in range(10):
            state = self.cell(self.embed(last), state)
            out.append(4 * self.head(state))
            last = out[-1].argmax(1) if fed is None else fed[:, step]
        return torch.stack(out, 1)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_decoder_that_reads_its_own_symbols_gains_by_data(bits):
    net = Decoder().eval()
    torch.manual_seed(1)
    fresh, data = torch.randn(200, 24), [torch.randn(32, 24) for _ in range(8)]
    with torch.no_grad():
        wanted = net(fresh)
        symbols = wanted.argmax(-1)

    def divergence(quantized):
        other = Decoder().eval()
        quantized.apply_to(other)
        with torch.no_grad():
            found = other(fresh, symbols).log_softmax(-1)
        return float(F.kl_div(found, wanted.softmax(-1), reduction="none").sum(-1).mean())

    plain = divergence(quantize(net, bits, method="mse", progress=False))
    assert divergence(quantize(net, bits, data=data, progress=False)) < 0.7 * plain
