"""The nearest of the names that a configuration knows, and what an option must be in words."""

import pytest

from clipquant.cli.names import annotation, classes, meant, readable


def test_the_nearest_name_is_asked_for_or_all_of_a_few_are_told():
    assert meant("learning_rate", ("lr", "optimizer")) == " It has lr, optimizer."
    assert meant("optimiser", ("lr", "optimizer")) == " Did you mean 'optimizer'?"
    assert meant("seed", ("seed_everything", "trainer")) == " Did you mean 'seed_everything'?"
    assert meant("xyz", map(str, range(40))) == ""
    assert meant("x", ()) == ""


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("mode", "'min', 'max' or null"),
        ("bits", "int or 'auto'"),
        ("overrides", "dict[str, int] or null"),
        ("no_such", ""),
    ],
)
def test_an_option_is_told_by_its_own_annotation(option, words):
    assert annotation("clipquant.QuantizeOnFitEnd", option) == words


def test_types_of_a_parser_are_told_as_a_reader_knows_them():
    assert readable("[<class 'int'>, <class 'NoneType'>]") == "int or null"
    assert {"Norm", "QuantizeOnFitEnd", "ModelCheckpoint", "CSVLogger"} <= set(classes())
