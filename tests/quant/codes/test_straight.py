"""Latent codes: they begin at the codes given, and their gradients are those of the formula."""

import pytest
import torch

from clipquant.quant.codes.grid import Coded, Grid
from clipquant.quant.codes.ranges import mse_grid
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.codes.straight import Latent

SPECS = [
    QuantSpec(1),
    QuantSpec(2, granularity=4),
    QuantSpec(2, symmetric=True),
    QuantSpec(3, granularity="tensor"),
    QuantSpec(4, levels=8),
    QuantSpec(8),
]


def latent(spec, dtype=torch.float32):
    torch.manual_seed(0)
    matrix = torch.randn(5, 10, dtype=dtype)
    coded = Coded.nearest(matrix, mse_grid(matrix, spec))
    codes = (coded.codes + torch.randint(0, 2, coded.codes.shape)).clamp(max=spec.steps)
    return Latent.of(matrix, Coded(codes.to(torch.uint8), coded.grid)), matrix


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_begins_at_the_codes_given_and_stands_for_what_it_stores(spec, dtype):
    made, matrix = latent(spec, dtype)
    coded = made.coded()
    first = Coded.nearest(matrix, coded.grid)
    assert ((coded.codes.int() - first.codes.int()) >= 0).all()
    assert not torch.equal(coded.codes, first.codes)
    assert coded.grid.scale.dtype == made.grid.scale.dtype
    assert torch.equal(coded.grid.scale, made.grid.scale)
    with torch.no_grad():
        made.stretch += 0.1
        if made.shift is not None:
            made.shift -= 0.3
        made.place += torch.randn_like(made.place)
    assert torch.allclose(made.matrix().double(), made.coded().values().double(), atol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_are_those_of_the_formula_with_rounding_as_the_identity(spec):
    made, _ = latent(spec)
    leaves = [leaf.requires_grad_(True) for _, leaf in made.leaves()]
    with torch.no_grad():
        made.place.add_(torch.randn_like(made.place))
        made.limit_()
    pull = torch.randn(5, 10)
    own = torch.autograd.grad((made.matrix() * pull).sum(), leaves)

    def wide(part):
        grown = part.expand(5, -1).repeat_interleave(made.grid.group_size, 1)
        return grown[:, :10]

    codes = made.place.detach().round().clamp(0, spec.steps)
    through = made.place + (codes - made.place).detach()
    zero = (
        (spec.steps + 1) // 2 if made.shift is None else wide(made.grid.zero.float() + made.shift)
    )
    weights = wide(made.grid.scale.float() * made.stretch.exp()) * (through - zero)
    slow = torch.autograd.grad((weights * pull).sum(), leaves)
    for fast, want in zip(own, slow, strict=True):
        assert torch.allclose(fast, want, atol=1e-4)


def test_latent_codes_stay_where_a_step_back_is_seen():
    made, _ = latent(QuantSpec(2))
    with torch.no_grad():
        made.place.sub_(1.5).mul_(100)
    made.limit_()
    assert made.place.min() == -0.5
    assert made.place.max() == 3.5
    assert made.coded().codes.max() == 3


def test_a_constant_row_and_rows_of_their_own_widths_are_kept():
    grid = Grid(
        torch.tensor([[-0.7], [0.5]]), torch.tensor([[-1.0], [1.0]]), torch.tensor([[0], [3]]), 3
    )
    coded = Coded(torch.tensor([[0, 0, 0], [0, 2, 3]]).byte(), grid)
    made = Latent.of(coded.values(), coded)
    made.limit_()
    assert torch.equal(made.coded().codes, coded.codes)
    assert torch.equal(made.matrix(), coded.values())
