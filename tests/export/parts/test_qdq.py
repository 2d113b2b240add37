"""Ranges and codes that onnxruntime's quantizer is told."""

import numpy as np
import pytest
import torch

from clipquant.export.parts.onnx_weights import keeps_codes
from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.spec import QuantSpec
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
    ],
)
def test_codes_are_kept_where_int8_holds_them(spec, layout, kept):
    tensor = quantize_weight(torch.randn(layout.shape), spec, layout)
    assert keeps_codes(tensor) is kept
    if kept:
        codes = tensor.codes.numpy().astype(int) - 127
        assert np.abs(codes).max() <= 127
