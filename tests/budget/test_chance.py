"""A drop is a sample of the true one: its standard error, and how often a promise about it holds."""

import math
from statistics import NormalDist

import pytest
import torch

from clipquant.budget.bisection import smallest_that_holds
from clipquant.budget.chance import Drop, Judged, Parts, drop_between, jackknife_error
from clipquant.budget.goal import check_confidence
from clipquant.errors import ArgumentError

PARTS = 32


def judged(right):
    """The share of right answers, in parts as validation gives them."""
    part = torch.arange(len(right)) % PARTS
    parts = Parts.of_means(
        torch.bincount(part).tolist(), torch.bincount(part, weights=right.double()).tolist()
    )
    return Judged({"acc": parts.whole}, {"acc": parts})


def test_the_jackknife_of_a_mean_is_the_textbooks_error():
    torch.manual_seed(0)
    values = torch.randn(200).double()
    parts = Parts.of_means([1] * 200, values.tolist())
    error = jackknife_error(parts.samples, parts.without, parts.whole)
    assert error == pytest.approx(float(values.std() / math.sqrt(200)), rel=1e-9)
    assert parts.means() == pytest.approx(values.tolist(), abs=1e-9)


def test_parts_of_unlike_size_give_the_error_that_fresh_samples_show():
    sizes = [40] * 15 + [7]
    errors, means = [], []
    for seed in range(400):
        torch.manual_seed(seed)
        sums = [float(part.sum()) for part in torch.randn(sum(sizes)).split(sizes)]
        parts = Parts.of_means(sizes, sums)
        errors.append(jackknife_error(parts.samples, parts.without, parts.whole) ** 2)
        means.append(parts.whole)
    seen = float(torch.tensor(means).var())
    assert sum(errors) / len(errors) == pytest.approx(seen, rel=0.25)


def test_what_both_networks_get_wrong_is_no_noise():
    torch.manual_seed(0)
    right = torch.rand(3200) < 0.5
    worse = right.clone()
    worse[::100] = False
    paired = drop_between(judged(right), judged(worse), "acc", "max")
    alone = math.sqrt(0.5 * 0.5 / 3200)
    assert paired.error < alone / 2
    assert drop_between(judged(right), judged(right), "acc", "max").error == 0


def test_none_lost_of_a_few_is_no_proof():
    none_lost = drop_between(
        judged(torch.ones(100).bool()), judged(torch.ones(100).bool()), "acc", "max"
    )
    assert none_lost.value == none_lost.error == 0
    assert none_lost.step == pytest.approx(0.01)
    assert not none_lost.holds(0.005)  # half a sample
    assert none_lost.holds(0.02)
    assert not none_lost.holds(0.02, 0.95)
    assert none_lost.holds(0.04, 0.95)  # exactly: 0.96 ** 100 < 0.02
    assert none_lost.holds(0.0)  # nothing was seen to change, and nothing less can be asked


@pytest.mark.parametrize("scale", [1, 100])
def test_a_share_in_per_cent_is_one_too(scale):
    torch.manual_seed(0)
    right = (torch.rand(320) < 0.9) * float(scale)
    drop = drop_between(judged(right), judged(right), "acc", "max")
    assert drop.step == pytest.approx(scale / 320)


def test_a_loss_has_no_step_and_unlike_parts_no_error():
    torch.manual_seed(0)
    losses = torch.rand(320)
    first, second = judged(losses), judged(losses + 0.01 * torch.rand(320))
    drop = drop_between(first, second, "acc", "min")
    assert drop.step == 0
    assert 0 < drop.error < 0.001
    other = Judged(second.metrics, {"acc": Parts((1.0, 2.0), (0.5, 0.5), 0.5)})
    assert drop_between(first, other, "acc", "min").error is None
    assert drop_between(first, Judged({}), "acc", "min").holds(1.0) is False


def test_few_parts_are_less_sure():
    sure = [Drop(0.0, 0.01, parts=count).sure(0.02) for count in (3, 6, 1000)]
    students = [0.908, 0.949]  # of Student's distribution with 2 and 5 degrees at 2
    assert sure[:2] == pytest.approx(students, abs=0.003)
    assert sure[2] == pytest.approx(NormalDist().cdf(2), abs=1e-3)
    assert Drop(0.0).sure(0.02) is None
    assert Drop(0.0).holds(0.02, 0.99)
    assert not Drop(0.03).holds(0.02)


def search(seed, samples, confidence, allowed, parted=True):
    """One search among 400 sizes: returns the true drop of the one chosen.

    The smaller, the more answers change; right ones are lost, and every second wrong one that changes is won.
    Neighbouring sizes change much the same answers.
    """
    draws = torch.Generator().manual_seed(seed)
    right = torch.rand(samples, generator=draws) < 0.9
    firm, lucky = torch.rand(samples, generator=draws), torch.rand(samples, generator=draws) < 0.5
    before = judged(right)

    def changed(size):
        return 0.2 * math.exp(-size / 60)

    def answers(size):
        own = torch.Generator().manual_seed(1000 * seed + size)
        v = 0.7 * firm + 0.3 * torch.rand(samples, generator=own)
        rank = torch.where(v < 0.3, v.square() / 0.42, (v - 0.15) / 0.7)  # uniform below 0.7
        flips = rank < changed(size)
        return (right & ~flips) | (~right & flips & lucky)

    def holds(size):
        after = judged(answers(size))
        after = after if parted else Judged(after.metrics)
        return drop_between(before, after, "acc", "max").holds(allowed, confidence)

    size = smallest_that_holds(holds, range(400))
    return math.inf if size is None else changed(size) * (0.9 - 0.1 * 0.5)


@pytest.mark.parametrize("confidence", [None, 0.95])
@pytest.mark.parametrize("samples", [500, 4000])
def test_over_200_seeds_the_promised_drop_holds_on_fresh_data_as_often_as_claimed(
    samples, confidence
):
    claimed = confidence or NormalDist().cdf(1)
    held = [search(seed, samples, confidence, 0.01) <= 0.01 for seed in range(200)]
    assert sum(held) >= 200 * claimed - math.sqrt(200 * claimed * (1 - claimed))


def test_the_drop_measured_alone_holds_far_less_often():
    held = [search(seed, 500, None, 0.01, parted=False) <= 0.01 for seed in range(100)]
    assert sum(held) < 80


@pytest.mark.parametrize("wrong", [0.5, 1, 1.0, 0, 95, -1, True, "0.9", float("nan")])
def test_a_confidence_that_is_none_is_told(wrong):
    with pytest.raises(ArgumentError, match=r"above 0\.5 and below 1.*; got"):
        check_confidence(wrong, 0.01)
    check_confidence(0.9, 0.01)
    check_confidence(None, None)
    with pytest.raises(ArgumentError, match=r"confidence=0\.9 without max_drop"):
        check_confidence(0.9, None)
