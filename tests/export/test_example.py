import pytest
import torch
from torch import nn

from clipquant.export import Example, ExportError, as_example, find_example
from clipquant.export.example import largest_difference, reason

X = torch.randn(4, 3)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, ids, mask=None):
        return self.linear(ids) if mask is None else self.linear(ids * mask)


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X, torch.zeros(4)),
        [X, torch.zeros(4)],
        {"ids": X, "labels": torch.zeros(4)},
        ({"ids": X, "mask": torch.ones(4, 1)}, torch.zeros(4)),
        ((X, torch.ones(4, 1)), torch.zeros(4)),
    ],
)
def test_a_batch_of_any_form_gives_a_call(batch):
    assert find_example(Masked(), batch).run(Masked()).shape == (4, 2)


def test_the_masks_of_a_batch_are_used():
    mask = torch.zeros(4, 1)
    example = find_example(Masked(), ({"ids": X, "mask": mask}, torch.zeros(4)))
    assert example.kwargs["mask"] is mask


def test_the_modules_own_example_comes_first():
    model = nn.Linear(3, 2)
    model.example_input_array = torch.ones(7, 3)
    assert find_example(model, X).args[0].shape == (7, 3)


def test_an_example_that_cannot_be_inferred_says_what_to_set():
    with pytest.raises(ExportError, match=r"RuntimeError: .*example_input_array"):
        find_example(nn.Linear(5, 2), [X, torch.zeros(4)])
    with pytest.raises(ExportError, match="no example_input_array, and no data"):
        find_example(nn.Linear(5, 2))


def test_resizing_cuts_or_repeats_the_batch_alone():
    example = as_example({"x": X, "other": torch.ones(9), "scalar": torch.tensor(1.0)})
    example = Example((X, X * 2, torch.ones(9)), example.kwargs | {"flag": True})
    seven = example.resized(7)
    assert torch.equal(seven.args[0], torch.cat([X, X[:3]]))
    assert seven.args[2].shape == (9,)
    assert seven.kwargs["scalar"].dim() == 0
    assert seven.kwargs["flag"] is True
    assert example.resized(2).batch_size == 2


def test_differences_count_nan_against_a_number_and_not_against_nan():
    nan = torch.tensor([float("nan"), 1.0])
    assert largest_difference(nan, nan) == 0.0
    assert largest_difference(nan, torch.ones(2)) != largest_difference(nan, torch.ones(2))


class Loss(nn.Module):
    """Returns a loss where it is given labels."""

    def forward(self, x, labels=None):
        return x * 2 if labels is None else (x - labels).mean()


def test_a_call_that_was_seen_comes_first_without_its_targets():
    x, labels = torch.zeros(4, 3), torch.ones(4, 3)
    found = find_example(Loss(), [labels, x], call=Example((x,), {"labels": labels}))
    assert found.args[0] is x
    assert found.kwargs == {}


def test_a_reason_is_one_line_without_codes_and_names_a_cause_that_was_cut_off():
    long = ValueError("\x1b[31mheader\x1b[0m\n" + "x " * 400)
    long.__cause__ = TypeError("the\ncause itself")
    said = reason(long)
    assert "\x1b" not in said
    assert "\n" not in said
    assert said.startswith("ValueError: header x")
    assert said.endswith("caused by TypeError: the cause itself")
    short = ValueError("all: the cause itself")
    short.__cause__ = TypeError("the cause itself")
    assert reason(short) == "ValueError: all: the cause itself"
