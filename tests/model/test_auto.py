"""What bits="auto" cannot obey, and what it asks of the shapes alone."""

import pytest
import torch
from torch import nn

from clipquant import quantize
from clipquant.budget import BudgetError
from clipquant.errors import ArgumentError
from clipquant.model.auto import AutoBits, check_auto, check_smallest
from clipquant.quant.recipe import Recipe


@pytest.mark.parametrize(
    ("name", "value"),
    [("method", "hqq"), ("levels", 8), ("symmetric", True), ("granularity", "tensor")],
)
def test_what_rows_of_their_own_cannot_obey_is_named(name, value):
    check_auto(0.1, None, Recipe())
    with pytest.raises(ArgumentError, match=rf"got {name}={value!r}\. Leave {name} out"):
        check_auto(0.1, None, Recipe(**{name: value}))


def test_the_smallest_file_is_known_without_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 96), nn.ReLU(), nn.Linear(96, 6))
    with pytest.raises(BudgetError, match="below the smallest possible file") as told:
        check_smallest(model, AutoBits(None, 200, "score", "max"))
    smallest = int(str(told.value).split("file, ")[1].split(" bytes")[0].replace(",", ""))
    check_smallest(model, AutoBits(None, smallest, "score", "max"))
    data = [torch.randn(64, 40)]
    made = quantize(model, "auto", max_size=smallest + 300, data=data, progress=False)
    assert made.report.size_bytes <= smallest + 300


def test_widths_that_are_given_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 96), nn.ReLU(), nn.Linear(96, 6))
    made = quantize(
        model,
        "auto",
        max_size=0.5,
        data=[torch.randn(64, 40)],
        overrides={"2.*": 7},
        progress=False,
    )
    bits = made.weights.tensors["2.weight"].bits
    assert (bits == 7).all()
