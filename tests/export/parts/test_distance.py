import pytest
import torch
from torch import nn

from clipquant.export import Example
from clipquant.export.parts.distance import distance_judge, relative_error

CALL = Example((torch.tensor([3.0, 4.0]),))


def test_the_relative_error_is_that_of_floating_outputs():
    model = nn.Identity()
    assert relative_error(model, [CALL], lambda x: x) == 0.0
    assert relative_error(model, [CALL], lambda x: x * 0) == pytest.approx(1.0)
    assert relative_error(model, [CALL], lambda x: x * 1.1) == pytest.approx(0.1, rel=1e-3)
    assert not relative_error(model, [CALL], lambda x: x * torch.nan) <= 0.5


def test_infinities_of_both_are_no_error():
    call = Example((torch.tensor([3.0, -torch.inf]),))
    assert relative_error(nn.Identity(), [call], lambda x: x) == 0.0


def test_the_judge_gives_the_mean_of_the_largest_differences():
    calls = [CALL, Example((torch.tensor([8.0, 1.0]),))]
    judgement = distance_judge(nn.Identity(), calls)(lambda x: x + torch.tensor([0.0, 1.0]))
    assert judgement.drop == pytest.approx((1 / 4 + 1 / 8) / 2)
    assert judgement.metrics == {}
