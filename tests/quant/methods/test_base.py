"""A method of the user's own: an object with three members, in Python, in a Trainer and in a YAML file."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import yaml
from torch import nn

from clipquant import quantize
from clipquant.artifact import read_artifact
from clipquant.cli import main
from clipquant.quant.codes.grid import Coded
from clipquant.quant.codes.ranges import shrunk_grid
from clipquant.quant.methods import METHODS, Found, Method
from clipquant.quant.methods.base import by_weight
from clipquant.quant.methods.gptq import output_error_of
from clipquant.quant.methods.layerwise import layer_by_layer
from clipquant.quant.recipe import Recipe


@dataclass(frozen=True)
class Half:
    """Round to nearest on half the range, without data; no base class."""

    share: float = 0.5
    name: ClassVar[str] = "half"
    needs_data: ClassVar[bool] = False

    def solve(self, problem):
        return by_weight(lambda w, spec: Coded.nearest(w, shrunk_grid(w, spec, self.share)))(
            problem
        )


@dataclass(frozen=True)
class Best:
    """Take for each layer the range of least output error, on data."""

    shares: tuple[float, ...] = (1.0, 0.8, 0.6)
    name: ClassVar[str] = "best"
    needs_data: ClassVar[bool] = True

    def solve(self, problem):
        return layer_by_layer(self.code)(problem)

    def code(self, layer):
        error = output_error_of(layer.moments, 0, layer.centred)
        tried = [
            Coded.nearest(layer.matrix, shrunk_grid(layer.matrix, layer.spec, share))
            for share in self.shares
        ]
        return min(tried, key=lambda coded: float(error.of(coded).sum())), self.name


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def test_an_object_of_three_members_is_a_method():
    assert isinstance(Half(), Method)
    assert all(isinstance(method, Method) for method in METHODS.values())
    assert not isinstance(object(), Method)


def test_a_data_free_method_is_used_by_name_and_by_itself(monkeypatch):
    model = net()
    own = quantize(model, 4, method=Half(0.25))
    weight = model[0].weight.detach()
    assert own.weights.tensors["0.weight"].method == "half"
    state = own.state_dict()["0.weight"]
    assert torch.allclose(state.amax(1), weight.amax(1) / 4, rtol=2e-2)
    monkeypatch.setitem(METHODS, "half", Half())
    assert quantize(model, 4, method="half").report.layers[0].method == "half"


def test_a_calibrated_method_gets_the_layers_and_their_moments():
    model, data = net(), [torch.randn(64, 12) for _ in range(4)]
    made = quantize(model, 2, method=Best(), data=data)
    assert {t.method for t in made.weights.tensors.values()} == {"best"}
    plain = quantize(model, 2, method="rtn")

    def error(quantized):
        state, x = quantized.state_dict(), torch.cat(data)
        hidden = torch.relu(nn.functional.linear(x, state["0.weight"], state["0.bias"]))
        out = nn.functional.linear(hidden, state["2.weight"], state["2.bias"])
        return float((out - model(x)).square().mean().detach())

    assert error(made) < error(plain)
    with pytest.raises(ValueError, match="method='best' calibrates on data; got none"):
        quantize(model, 2, method=Best())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda codes: {}, "must give codes"),
        (lambda codes: {n: replace(c, codes=c.codes.long()) for n, c in codes.items()}, "uint8"),
        (lambda codes: {n: c.rows(0, 1) for n, c in codes.items()}, "of shape"),
        (
            lambda codes: {n: replace(c, grid=replace(c.grid, levels=3)) for n, c in codes.items()},
            "keep the grid asked for",
        ),
    ],
)
def test_what_a_method_returns_is_checked(spoil, said):
    class Spoilt(Half):
        def solve(self, problem):
            return Found(spoil(super().solve(problem).codes))

    with pytest.raises(TypeError, match=said):
        quantize(net(), 4, method=Spoilt())


@pytest.mark.parametrize("method", ["awq", 3, None, Half])
def test_anything_else_is_refused_with_the_names(method):
    with pytest.raises(ValueError, match=r"'auto', 'rtn'.*or an object with name.*got"):
        Recipe(method=method)


CONFIG = """
trainer:
  max_steps: 3
  limit_val_batches: 1
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: QuantizeOnFitEnd
      init_args:
        bits: 3
        method: {class_path: own_method.Quarter, init_args: {share: 0.25}}
model:
  class_path: TwoConvNet
data:
  class_path: RandomDigit
"""

MODULE = """
from dataclasses import dataclass
from typing import ClassVar

from clipquant.quant.codes.grid import Coded
from clipquant.quant.codes.ranges import shrunk_grid
from clipquant.quant.methods import Method
from clipquant.quant.methods.base import by_weight


@dataclass(frozen=True)
class Quarter(Method):
    share: float = 1.0
    name: ClassVar[str] = "quarter"
    needs_data: ClassVar[bool] = False

    def solve(self, problem):
        return by_weight(lambda w, spec: Coded.nearest(w, shrunk_grid(w, spec, self.share)))(problem)
"""


def test_a_yaml_file_names_it_by_class_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_method.py").write_text(MODULE)
    config = yaml.safe_load(CONFIG)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "own.yaml"]) == 0
    (artifact,) = tmp_path.rglob("*.safetensors")
    assert {t.method for t in read_artifact(artifact).weights.tensors.values()} == {"quarter"}
