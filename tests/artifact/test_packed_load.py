import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import clipquant
from clipquant import load_quantized, quantize
from clipquant.artifact import ArtifactError

MEASURE = """
import gc, sys
sys.path.insert(0, source)
import torch
from torch import nn
from clipquant import load_quantized

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096

with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(layers)))
like = load_quantized(small, nn.Linear(512, 512), packed=True)  # imports what loading imports
with torch.no_grad():  # threads and kernels that a small model takes
    like(torch.randn(4, 512)), nn.Linear(1024, 1024)(torch.zeros(4, 1024))
before = resident()
load_quantized(path, model, packed=True)
loaded = resident()
with torch.no_grad():
    model(torch.zeros(4, 1024))
print(loaded - before, resident() - before)
"""


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    ).eval()


@pytest.fixture
def path(tmp_path):
    return quantize(net(), 3, granularity=16).save(tmp_path / "a.safetensors")


X = torch.randn(2, 1, 8, 8)


def test_outputs_are_those_of_the_dequantized_model(path):
    packed = load_quantized(path, net(), packed=True)
    with torch.no_grad():
        assert torch.equal(packed(X), load_quantized(path, net())(X))
    assert packed[4].packed_weight.codes3.numel() == 144 * 3 * 3 // 8


def test_a_model_on_the_meta_device_gets_every_tensor(path):
    with torch.device("meta"):
        model = net()
    load_quantized(path, model, packed=True)
    with torch.no_grad():
        assert torch.equal(model(X), load_quantized(path, net())(X))


def test_a_model_that_does_not_fit_is_left_as_it_is(path):
    other = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    )
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ArtifactError, match=r"4\.weight is \(3, 144\) in the file, \(5, 144\)"):
        load_quantized(path, other, packed=True)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_packed_needs_a_model(path):
    with pytest.raises(ValueError, match="packed=True needs a model"):
        load_quantized(path, packed=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_about_the_files_size_before_and_after_a_forward(tmp_path):
    layers = 96  # 100 M parameters
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(layers)))
    path = quantize(model, 4, method="rtn").save(tmp_path / "a.safetensors")
    small = quantize(nn.Linear(512, 512), 4, method="rtn").save(tmp_path / "b.safetensors")
    names = {"source": str(Path(clipquant.__file__).parents[1]), "layers": layers}
    names |= {"path": str(path), "small": str(small)}
    head = "".join(f"{k} = {v!r}\n" for k, v in names.items())
    done = subprocess.run(
        [sys.executable, "-c", head + MEASURE], capture_output=True, text=True, check=True
    )
    loaded, used = (int(size) / path.stat().st_size for size in done.stdout.split())
    assert (loaded <= 1.15, used <= 1.15) == (True, True), (loaded, used)
