"""Masks: exactly as many weights as asked for, the highest, in every scope and pattern."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipquant.errors import ArgumentError
from clipquant.quant.codes.layout import Layout
from clipquant.quant.training.masks import LEAST, Pattern, global_masks, layer_masks


def made(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "small": torch.rand(3, 4, generator=generator),
        "large": torch.rand(20, 30, generator=generator) * 5,
        "ties": torch.randint(0, 2, (10, 10), generator=generator).float(),
    }


@given(st.integers(0, 50), st.floats(0.0, 0.98))
def test_as_many_are_kept_as_asked_for_and_no_layer_is_cut_through(seed, sparsity):
    scores = made(seed)
    total = sum(s.numel() for s in scores.values())
    together, each = global_masks(scores, sparsity), layer_masks(scores, sparsity)
    kept = sum(int(mask.sum()) for mask in together.values())
    assert abs(kept - (1 - sparsity) * total) <= 1
    for name, score in scores.items():
        assert int(together[name].sum()) >= max(round(LEAST * (1 - sparsity) * score.numel()), 1)
        assert abs(int(each[name].sum()) - (1 - sparsity) * score.numel()) <= 1
        for mask in (together[name], each[name]):
            if not bool(mask.all()):
                assert float(score[mask].min()) >= float(score[~mask].max())


def test_layers_compete_in_the_global_scope():
    scores = {"low": torch.rand(100), "high": 10 + torch.rand(100)}
    masks = global_masks(scores, 0.5)
    assert int(masks["high"].sum()) == 95
    assert int(masks["low"].sum()) == 5  # its tenth
    assert int(layer_masks(scores, 0.5)["low"].sum()) == 50


@pytest.mark.parametrize(
    "layout", [Layout((6, 16)), Layout((4, 6, 3), axis=1), Layout((8, 2, 3, 3), axis=1, groups=2)]
)
@given(seed=st.integers(0, 20))
def test_a_pattern_holds_along_the_inputs_of_every_output(layout, seed):
    score = torch.rand(layout.shape, generator=torch.Generator().manual_seed(seed))
    (mask,) = Pattern.of("2:4").masks({"w": score}, {"w": layout}, 1.0).values()
    matrix, kept = layout.fold(score), layout.fold(mask)
    whole = matrix.shape[1] // 4 * 4
    groups, marks = matrix[:, :whole].reshape(-1, 4), kept[:, :whole].reshape(-1, 4)
    assert bool((marks.sum(1) == 2).all())
    assert bool(kept[:, whole:].all())
    best = groups.sort(1).values[:, 2:].sum(1)
    torch.testing.assert_close((groups * marks).sum(1), best)


def test_a_pattern_comes_group_by_group_those_first_that_lose_least():
    score = torch.tensor([[1.0, 1.0, 9.0, 9.0, 5.0, 5.0, 9.0, 9.0]])
    layouts = {"w": Layout((1, 8))}
    pattern = Pattern.of("2:4")
    shares = [int(pattern.masks({"w": score}, layouts, share)["w"].sum()) for share in (0, 0.5, 1)]
    assert shares == [8, 6, 4]
    half = pattern.masks({"w": score}, layouts, 0.5)["w"]
    assert half.tolist() == [[False, False, True, True, True, True, True, True]]


@pytest.mark.parametrize("text", ["2", "0:4", "4:4", "5:4", "a:b", "2:4:8", 24, "-1:4"])
def test_a_pattern_that_cannot_be_is_refused(text):
    with pytest.raises(ArgumentError, match="pattern must be 'N:M'"):
        Pattern.of(text)


def test_a_score_that_is_no_number_counts_least():
    scores = {"w": torch.tensor([float("nan"), 1.0, 2.0, float("nan")])}
    assert layer_masks(scores, 0.5)["w"].tolist() == [False, True, True, False]
