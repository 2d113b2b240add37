"""README's example of serving: onnxruntime and numpy are all that it takes."""

import re
from pathlib import Path

import pytest
import torch

from clipquant import TwoConvNet
from clipquant.export import Example, export_onnx
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.skipif(not README.is_file(), reason="README is not part of this source tree")
def test_the_serving_example_runs(tmp_path, run_without):
    found = re.search(r"<!-- serve -->.*?```python\n(.*?)```", README.read_text(), re.DOTALL)
    source = found.group(1)
    assert len([line for line in source.splitlines() if line.strip()]) <= 10
    torch.manual_seed(0)
    model = TwoConvNet().eval()
    weights = quantize_weights(model, Recipe(8))
    export_onnx(model, weights, Example((torch.zeros(1, 1, 28, 28),)), tmp_path / "model.onnx")
    said = run_without(f"import os; os.chdir({str(tmp_path)!r})\n{source}", "torch", "clipquant")
    assert said.strip() == f"({', '.join(['4', '10'])})"
