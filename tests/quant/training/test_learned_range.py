"""Ranges of a layer's inputs: seen without a trace, then on a grid with an exact zero, and resumed."""

import pytest
import torch

from clipquant.quant.training.learned_range import STEPS, LearnedRange


def begun(*batches):
    learned = LearnedRange.new()
    for batch in batches:
        assert learned.fake(batch) is batch
    learned.begin_(learned.ends)
    return learned


def test_it_begins_with_what_batches_had_and_zero_is_exact():
    learned = begun(torch.tensor([-1.0, 2.0]), torch.tensor([-1.0, 2.0]))
    low, high = learned.now()
    assert (low, high) == (pytest.approx(-1, abs=0.02), pytest.approx(2, abs=0.02))
    values = learned.fake(torch.linspace(-9, 9, 2001))
    assert len(values.unique()) == STEPS + 1
    assert (float(values.min()), float(values.max())) == pytest.approx((low, high))
    assert float(learned.fake(torch.zeros(1))) == 0.0


def test_what_is_not_finite_or_seen_without_gradients_is_no_range():
    learned = LearnedRange.new()
    learned.fake(torch.tensor([1.0, float("inf")]))
    learned.fake(torch.tensor([float("nan")]))
    with torch.no_grad():
        learned.fake(torch.tensor([7.0]))
    assert learned.seen == 0
    assert learned.now() is None


def test_ends_learn_and_gradients_stop_outside():
    learned = begun(torch.tensor([0.0, 1.0]))
    inputs = torch.tensor([0.5, 5.0], requires_grad=True)
    learned.fake(inputs).sum().backward()
    assert inputs.grad.tolist() == [1.0, 1.0]  # a step down brings the second one back
    assert float(learned.stretch.grad) > 0  # a wider range raises what is cut off
    inputs.grad = None
    (-learned.fake(inputs)).sum().backward()
    assert inputs.grad.tolist() == [-1.0, 0.0]
    assert all(leaf.requires_grad for leaf in learned.leaves())
    assert list(LearnedRange.new(learn=False).leaves()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_keep_their_dtype(dtype):
    learned = begun(torch.tensor([-1.0, 1.0]))
    assert learned.fake(torch.randn(3, dtype=dtype)).dtype is dtype


def test_a_state_goes_on_to_the_last_bit():
    fresh, learned = LearnedRange.new(), begun(torch.tensor([-1.0, 3.0]))
    fresh.fake(torch.tensor([0.5, 2.0]))
    with torch.no_grad():
        learned.stretch.add_(0.3)
        learned.shift.add_(1.7)
    for one in (fresh, learned):
        again = LearnedRange.from_state_dict(one.state_dict(), True, torch.device("cpu"))
        assert again.now() == one.now()
        assert (again.seen, again.ends.tolist()) == (one.seen, one.ends.tolist())


def test_inputs_that_are_all_zero_have_a_range():
    learned = begun(torch.zeros(4))
    assert bool(learned.fake(torch.ones(2)).isfinite().all())
