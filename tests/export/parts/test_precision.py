import pytest
import torch
from torch import nn

from clipquant.export import FORMATS, Example, Subject
from clipquant.export.parts.precision import in_float32, without_bfloat16
from clipquant.export.parts.sessions import open_any
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe


def subject_of(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(32, 5))
    call = Example((torch.randn(2, 2, 6, dtype=dtype),))
    model = model.eval().to(dtype)
    return Subject(quantize_weights(model, Recipe(8)), model, call, calibration=[call])


@pytest.mark.parametrize("name", ["onnx", "onnx-nbits"])
def test_a_bfloat16_model_has_a_file_in_float32_that_says_so(name, tmp_path):
    subject = subject_of(torch.bfloat16)
    record = FORMATS[name].write(subject, tmp_path / "a.onnx")
    assert "bfloat16 became float32" in record.notes[0]
    assert record.difference <= 1e-4
    assert open_any(tmp_path / "a.onnx").get_inputs()[0].type == "tensor(float)"
    assert next(subject.model.parameters()).dtype == torch.bfloat16


def test_others_stay_as_they_are():
    for dtype in (torch.float32, torch.float16):
        subject = subject_of(dtype)
        assert without_bfloat16(subject) == (subject, ())


def test_the_model_itself_turns_and_integers_stay():
    model = nn.BatchNorm1d(2).double()
    (note,) = in_float32(model)
    assert "float64 became float32" in note
    assert model.running_mean.dtype == torch.float32
    assert model.num_batches_tracked.dtype == torch.int64
