"""A score of the user's own, as one figure or one for each sample."""

import pytest
import torch
from torch import nn

from clipquant.errors import RunError
from clipquant.model.score import judged_by


def test_a_tensor_of_samples_counts_by_its_mean_and_tells_its_parts():
    values = torch.tensor([1.0, 0.0, 1.0, 1.0])
    judged = judged_by(lambda model: values, nn.Identity())
    assert judged.metrics == {"score": 0.75}
    assert judged.parts["score"].samples == (1.0, 1.0, 1.0, 1.0)
    assert not judged.whole_only


@pytest.mark.parametrize("value", [0.5, torch.tensor(0.5), torch.tensor([0.5])])
def test_one_figure_has_no_parts(value):
    judged = judged_by(lambda model: value, nn.Identity())
    assert judged.metrics == {"score": 0.5}
    assert "score" not in judged.parts
    assert judged.whole_only


def test_what_is_no_number_is_named():
    with pytest.raises(RunError, match="score must return a number"):
        judged_by(lambda model: "good", nn.Identity())
