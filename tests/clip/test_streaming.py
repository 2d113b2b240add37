"""Large gradients clamped piece by piece: exact whatever the pieces are, and measured as a whole."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from clipquant.clip.streaming import as_vectors, clamp_plain_

SHAPES = [(3,), (0,), (40, 30), (5000,), (70, 100), (9,), (), (100, 60)]


@pytest.fixture(params=[(1 << 20, 1 << 18), (1000, 50)], ids=["whole", "in pieces"])
def pieces(request: pytest.FixtureRequest) -> object:
    piece, chunk = request.param
    name = "clipquant.clip.streaming"
    with patch(f"{name}._PIECE", piece), patch(f"{name}._CHUNK", chunk):
        yield


def grads(scale: float) -> list[Tensor]:
    torch.manual_seed(0)
    found = [scale * torch.randn(shape) for shape in SHAPES]
    found[-1] = found[-1].t()
    return found


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("scale", [0.01, 1.0, 1e25])
@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("later", [True, False])
def test_it_is_torchs_clamp_to_the_bit(scale: float, measure: bool, later: bool) -> None:
    given = grads(scale)
    expected = [grad.clamp(-1, 1) for grad in given]
    before = [float(grad.double().norm()) for grad in given]
    outcome = clamp_plain_(given, 1.0, True, measure, later)
    assert outcome is not None
    assert outcome.finite
    assert outcome.clipped == (scale >= 1)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    if not measure:
        assert outcome.before is None
        return
    after = [float(grad.double().norm()) for grad in expected]
    assert outcome.before is not None
    assert outcome.after is not None
    assert outcome.before.each.tolist() == pytest.approx(before, rel=1e-5)
    assert outcome.after.each.tolist() == pytest.approx(after, rel=1e-5)
    assert outcome.before.total == pytest.approx(math.hypot(*before), rel=1e-5)
    assert outcome.after.total == pytest.approx(math.hypot(*after), rel=1e-5)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("limit", [1.0, math.inf])
@pytest.mark.parametrize("where", [0, 2, 3, 7])
def test_what_is_not_finite_is_found_and_left(bad: float, limit: float, where: int) -> None:
    given = grads(1.0)
    given[where][(-1,) * given[where].ndim] = bad
    outcome = clamp_plain_(given, limit, True, True, False)
    assert outcome is not None
    assert not outcome.finite
    assert outcome.before is not None
    assert [math.isfinite(n) for n in outcome.before.each.tolist()].index(False) == where
    assert given[where][(-1,) * given[where].ndim].item() == pytest.approx(bad, nan_ok=True)


def test_only_float32_of_a_cpu_without_gaps_comes_as_vectors() -> None:
    assert as_vectors([torch.ones(100, 60).t(), torch.ones(3)]) is not None
    others = [torch.ones(2).double(), torch.ones(9000, 2)[:, 0], torch.ones(2).to_sparse()]
    others += [torch.ones(2, device="meta"), torch.ones(1).expand(9000)]
    assert all(as_vectors([torch.ones(2), other]) is None for other in others)
    with torch.inference_mode():
        inferred = torch.ones(2)
    assert as_vectors([inferred]) is None
