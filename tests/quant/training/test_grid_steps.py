"""The steps of grids: by their own gradients alone, skipped where those are not finite, and resumed."""

import copy

import torch

from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.training.grid_steps import GridSteps
from clipquant.quant.training.learned_grid import LearnedGrid, first_grid


def made():
    torch.manual_seed(0)
    weights = {name: torch.randn(2, 8, requires_grad=True) for name in "ab"}
    grids = {
        name: LearnedGrid.of(first_grid(weight, Layout((2, 8)), QuantSpec(2)))
        for name, weight in weights.items()
    }
    return weights, grids


def backward(weights, grids):
    sum(grids[n].fake(w).square().sum() for n, w in weights.items()).backward()


def test_only_the_grids_asked_for_move_and_others_keep_their_gradients():
    weights, grids = made()
    steps = GridSteps(grids)
    backward(weights, grids)
    waiting = grids["b"].stretch.grad.clone()
    steps.step_(["a"], 1.0, 1.0, None)
    assert bool((grids["a"].stretch != 0).all())
    assert bool((grids["b"].stretch == 0).all())
    assert grids["a"].stretch.grad is None
    assert torch.equal(grids["b"].stretch.grad, waiting)


def test_a_factor_is_divided_out_and_a_gradient_that_is_not_finite_moves_nothing():
    moved = []
    for factor in (1.0, 1024.0, float("nan")):
        weights, grids = made()
        steps = GridSteps(grids)
        backward(weights, grids)
        for grid in grids.values():
            for leaf in grid.leaves():
                leaf.grad.mul_(factor)
        steps.step_(["a", "b"], 1.0, factor, None)
        moved.append(grids["a"].stretch.detach().clone())
    torch.testing.assert_close(moved[0], moved[1])
    assert bool((moved[2] == 0).all())


def test_the_mean_over_processes_is_what_moves():
    weights, grids = made()
    backward(weights, grids)
    seen = []

    def mean(slopes):
        seen.append(slopes.numel())
        return torch.zeros_like(slopes)

    GridSteps(grids).step_(["a", "b"], 1.0, 1.0, mean)
    assert seen == [8]  # one tensor for all: two rows of scale and zero a weight
    assert bool((grids["a"].stretch == 0).all())


def test_a_state_goes_on_to_the_last_bit():
    weights, grids = made()
    steps = GridSteps(grids)
    for _ in range(2):
        backward(weights, grids)
        steps.step_(["a", "b"], 0.5, 1.0, None)
    saved = copy.deepcopy(steps.state_dict())
    again = {
        n: LearnedGrid.from_state_dict(g.state_dict(), True, torch.device("cpu"))
        for n, g in grids.items()
    }
    others = GridSteps(again)
    others.load_state_dict(saved)
    for own, moved in ((grids, steps), (again, others)):
        backward(weights, own)
        moved.step_(["a", "b"], 0.25, 1.0, None)
    assert all(torch.equal(again[n].stretch, grids[n].stretch) for n in "ab")


def test_grids_that_are_not_learned_have_no_steps():
    weights, grids = made()
    fixed = {n: LearnedGrid.of(g.first, learn=False) for n, g in grids.items()}
    steps = GridSteps(fixed)
    backward(weights, fixed)
    steps.step_(["a"], 1.0, 1.0, None)
    assert steps.state_dict() == {}
