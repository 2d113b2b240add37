"""What weights count: by definition, without what is not finite, and resumed."""

import pytest
import torch
from torch import nn

from clipquant.quant.training.scores import CRITERIA, Scores


def weight(value, slope):
    parameter = nn.Parameter(torch.tensor(value))
    parameter.grad = torch.tensor(slope)
    return {"w": parameter}


def test_each_counts_what_its_paper_says():
    steps = [weight([1.0, -2.0, 3.0], [0.5, 0.5, -1.0]), weight([2.0, -2.0, 3.0], [1.0, 0.0, 1.0])]
    own = {"w": torch.tensor([2.0, -2.0, 3.0])}
    found = {}
    for name in CRITERIA:
        scores = Scores(name)
        for step in steps:
            scores.add_(step)
        found[name] = scores.of(own, {})["w"].tolist()
    assert found["magnitude"] == [2.0, 2.0, 3.0]
    assert found["movement"] == [-2.5, 1.0, 0.0]
    assert found["gradient"] == pytest.approx([0.99 * 0.5 + 0.02, 0.99, 3.0])


@pytest.mark.parametrize("name", CRITERIA)
def test_what_is_pruned_stays_pruned_and_what_is_not_finite_says_nothing(name):
    scores = Scores(name)
    scores.add_(weight([1.0, 2.0], [1.0, 1.0]))
    before = {n: s.clone() for n, s in scores.seen.items()}
    scores.add_(weight([1.0, 2.0], [float("inf"), 1.0]))
    assert all(torch.equal(s, before[n]) for n, s in scores.seen.items())
    found = scores.of({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([True, False])})["w"]
    assert found[1] == -torch.inf
    again = Scores(name)
    again.load_state_dict(scores.state_dict(), torch.device("cpu"))
    assert torch.equal(
        again.of({"w": torch.ones(2)}, {})["w"], scores.of({"w": torch.ones(2)}, {})["w"]
    )
