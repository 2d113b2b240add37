"""The codes and scales that onnxruntime's quantizer is told."""

import numpy as np
import pytest
import torch

from clipquant.export.parts.onnx_weights import keeps_codes
from clipquant.export.parts.places import places_of
from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.codes.tensor import dequantize
from clipquant.quant.methods.rtn import quantize_weight


@pytest.mark.parametrize(
    ("spec", "layout", "kept"),
    [
        (QuantSpec(8), Layout((6, 8)), True),
        (QuantSpec(8, granularity="tensor"), Layout((6, 8)), True),
        (QuantSpec(8, granularity=4), Layout((6, 8)), False),
        (QuantSpec(8, symmetric=False), Layout((6, 8)), False),
        (QuantSpec(7), Layout((6, 8)), False),
        (QuantSpec(8), Layout((6, 2, 3), axis=1, groups=3), False),
        (QuantSpec(8), Layout((6, 2, 3), axis=1), True),
        (QuantSpec(8), Layout((6, 2, 3), axis=-1), False),
    ],
)
def test_codes_are_kept_where_int8_holds_them(spec, layout, kept):
    tensor = quantize_weight(torch.randn(layout.shape), spec, layout)
    assert keeps_codes(tensor) is kept
    if kept:
        codes = tensor.codes.numpy().astype(int) - 127
        assert np.abs(codes).max() <= 127


def test_a_weight_is_found_under_any_name_turned_and_scaled_by_channel():
    torch.manual_seed(0)
    tensor = quantize_weight(torch.randn(6, 8), QuantSpec(8))
    weight = dequantize(tensor).numpy()
    factors = np.array([1.0, -2.0, 0.5, 3.0, 1.0, 1.0], dtype=np.float32)
    arrays = {"a": weight, "b": weight.T, "c": weight * factors[:, None], "d": weight[::-1]}
    places = {place.name: place for place in places_of(tensor, arrays)}
    assert {name: place.axis for name, place in places.items()} == {"a": 0, "b": 1, "c": 0}
    assert np.allclose(places["c"].factors, factors)
