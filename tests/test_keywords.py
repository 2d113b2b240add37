"""Keywords of other libraries, told with what the same is called here."""

import inspect

import pytest
from torch import nn

from clipquant import GradientClipCallback, QuantizeOnFitEnd, quantize
from clipquant.errors import ClipquantError
from clipquant.keywords import OF_QUANTIZING


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"nbits": 4}, "give bits=4"),
        ({"group_size": 64}, "give granularity=64"),
        ({"metric": "val_acc"}, "give monitor='val_acc'"),
        ({"skip": ["fc"]}, r"give exclude=\[\.\.\.\], globs"),
        ({"calibration_batch": 4}, "give calibration_batches=4"),
        ({"colour": 1}, "its arguments are bits, levels"),
    ],
)
def test_callback_names_the_keyword_that_is_meant(given, told):
    with pytest.raises(TypeError, match=told) as error:
        QuantizeOnFitEnd(**given)
    assert isinstance(error.value, ClipquantError)
    assert str(error.value).startswith("QuantizeOnFitEnd has no argument ")


def test_function_names_what_it_has_and_nothing_else():
    with pytest.raises(TypeError, match="quantize has no argument n_bits=4: give bits=4"):
        quantize(nn.Linear(4, 4), n_bits=4)
    with pytest.raises(
        TypeError, match="quantize has no argument dataset=DataSet: give data=DataSet"
    ):
        quantize(nn.Linear(4, 4), dataset=type("DataSet", (), {"__repr__": lambda s: "x" * 99})())
    with pytest.raises(TypeError, match="its arguments are") as error:
        quantize(nn.Linear(4, 4), watch="acc")  # it has no monitor to name
    assert "monitor" not in str(error.value)


def test_signatures_stay():
    assert list(inspect.signature(quantize).parameters)[:2] == ["model", "bits"]
    assert "rule" in inspect.signature(GradientClipCallback).parameters
    assert "max_drop" in inspect.signature(QuantizeOnFitEnd).parameters


def test_every_keyword_meant_is_one_of_the_callback_or_the_function():
    known = {
        *inspect.signature(QuantizeOnFitEnd).parameters,
        *inspect.signature(quantize).parameters,
    }
    assert {meant.split("=")[0] for meant in OF_QUANTIZING.values()} <= known
    assert not set(OF_QUANTIZING) & known
