"""The settings of quantizing: what they refuse, what each weight gets, whether data matter."""

import pytest
from torch import nn

from clipquant.errors import ClipquantError
from clipquant.quant.methods import METHODS, Gptq
from clipquant.quant.recipe import Recipe, data_free


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 9}, "from 1 to 8; got 9"),
        ({"levels": 0}, "levels"),
        ({"granularity": "row"}, "got 'row'"),
        ({"method": "awq"}, "'rtn'.*got 'awq'"),
        ({"overrides": {"*": 12}}, "got 12"),
        ({"bits": 1, "symmetric": True}, "symmetric"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_written_down(settings, said):
    with pytest.raises(ClipquantError, match=said):
        Recipe(**settings)


def test_overrides_give_bits_of_their_own_and_the_first_match_holds():
    recipe = Recipe(4, overrides={"0.*": 8, "*": 2}, granularity=2)
    specs = recipe.specs(recipe.select(net()).targets)
    assert {name: (s.bits, s.granularity) for name, s in specs.items()} == {
        "0.weight": (8, 2),
        "2.weight": (2, 2),
    }
    with pytest.raises(ClipquantError, match=r"overrides=.*'conv.*matches no parameter"):
        Recipe(overrides={"conv*": 2}).specs(recipe.select(net()).targets)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(8), False),
        (Recipe(4), True),
        (Recipe(8, overrides={"0.*": 3}), True),
        (Recipe(4, method="mse"), False),
        (Recipe(8, method=Gptq(damping=0.1)), True),
    ],
)
def test_whether_batches_make_a_difference(recipe, expected):
    assert recipe.reads_data(net()) is expected
    assert Recipe(8).reads_data(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_without_data_a_calibrated_method_gives_way():
    assert Recipe(4, method="gptq").without_data().method == "auto"
    assert Recipe(4, method="hqq").without_data().method == "hqq"
    assert Recipe(4, method="auto").solver is METHODS["auto"]
    assert data_free() == "'rtn', 'mse' or 'hqq'"
