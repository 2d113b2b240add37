"""Modules and parameters by key, in models whose modules are called like methods of nn.Module."""

import pytest
import torch
from torch import nn

from clipquant import load_quantized, quantize
from clipquant.quant.codes.paths import parameter_at, submodule


class Net(nn.Module):
    """Layers called like methods of every module, one within the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        inner = nn.Module()
        inner.type = nn.Linear(16, 16)
        self.half = inner
        self.float = nn.Linear(16, 4)

    def forward(self, x):
        return self._modules["float"](torch.tanh(self._modules["half"]._modules["type"](x)))


def test_what_stands_there_is_found_and_what_does_not_is_told():
    net = Net()
    assert submodule(net, "half.type") is net._modules["half"]._modules["type"]
    assert parameter_at(net, "float.bias") is net._modules["float"].bias
    for missing in ("half.none", "half.type.deeper"):
        with pytest.raises(AttributeError, match=missing):
            submodule(net, missing)
    with pytest.raises(AttributeError, match=r"half\.weight"):
        parameter_at(net, "half.weight")


@pytest.mark.parametrize("method", ["mse", "gptq", "adaround"])
def test_such_a_model_is_quantized_saved_and_loaded_packed(method, tmp_path):
    net, data = Net().eval(), [torch.randn(32, 16) for _ in range(4)]
    made = quantize(net, 4, method=method, data=data, progress=False)
    path = made.save(tmp_path / "a.safetensors")
    packed = load_quantized(path, Net(), packed=True).eval()
    plain = load_quantized(path, Net()).eval()
    assert torch.allclose(packed(data[0]), plain(data[0]), atol=1e-6)
