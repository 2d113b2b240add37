"""Plans that multiply: silent where nothing changes, their norms by arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clipquant.clip import Gradients
from clipquant.clip.rules.value import Clamp
from clipquant.clip.scale import Scale, ScaleEach


def example() -> tuple[Gradients, list[nn.Parameter]]:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    return Gradients([torch.tensor([3.0, 4.0]), torch.zeros(3)]), params


def test_a_scale_of_one_writes_nothing() -> None:
    grads, params = example()
    versions = [grad._version for grad in grads]
    assert not Scale(torch.tensor(1.0)).write_(grads, params).clipped
    each = ScaleEach({id(param): 1.0 for param in params})
    assert not each.write_(grads, params).clipped
    assert [grad._version for grad in grads] == versions


def test_scales_write_only_what_they_change() -> None:
    grads, params = example()
    version = grads[1]._version
    plan = ScaleEach({id(params[0]): 0.5, id(params[1]): 1.0})
    assert plan.write_(grads, params).clipped
    assert grads[0].tolist() == [1.5, 2.0]
    assert grads[1]._version == version


def test_norms_after_are_arithmetic_or_measured() -> None:
    grads, params = example()
    grads.norms()
    assert Scale(torch.tensor(0.5)).norms_after(grads, params, 2.0).each.tolist() == [2.5, 0.0]
    each = ScaleEach({id(params[0]): 0.1, id(params[1]): 1.0})
    assert each.norms_after(grads, params, 2.0).each.tolist() == pytest.approx([0.5, 0.0])
    Clamp(1.0).write_(grads, params)
    assert Clamp(1.0).norms_after(grads, params, 2.0).each.tolist() == pytest.approx(
        [math.sqrt(2), 0]
    )
