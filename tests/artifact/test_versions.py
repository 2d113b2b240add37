"""Files that released code has written load as they always did."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from clipquant.artifact import load_quantized, read_artifact, read_metadata, verify_artifact
from clipquant.report import report_of

HELD = Path(__file__).parent / "data" / "v1"
NAMES = sorted(
    p.name.removesuffix(".safetensors")
    for p in HELD.glob("*.safetensors")
    if ".state" not in p.name
)


def test_every_kind_of_file_is_there():
    assert NAMES == [
        "float64_scales", "gptq_rows_budget", "left_in_float", "nine_codes", "rows_of_0_bits", "rtn_report",
        "symmetric_groups", "tied",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_version_1_gives_the_state_that_it_gave(name):
    path = HELD / f"{name}.safetensors"
    assert read_metadata(path)["format_version"] == 1
    assert verify_artifact(path) == []
    wanted = safetensors.torch.load_file(HELD / f"{name}.state.safetensors")
    found = load_quantized(path)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_byte_of_a_file_of_version_1_is_found(name, tmp_path):
    data = (HELD / f"{name}.safetensors").read_bytes()
    path = tmp_path / "a"
    for index in range(0, len(data), 7):
        path.write_bytes(
            data[:index] + bytes([data[index] ^ (1 + index % 255)]) + data[index + 1 :]
        )
        assert verify_artifact(path), index


def test_damaged_tensors_of_version_1_are_named(tmp_path):
    data = bytearray((HELD / "tied.safetensors").read_bytes())
    data[-1] ^= 1
    path = tmp_path / "a"
    path.write_bytes(data)
    assert verify_artifact(path) == ["embed.weight.q"]


def test_a_report_of_version_1_is_read():
    path = HELD / "rtn_report.safetensors"
    held = read_artifact(path)
    report = report_of(held.weights, held.metadata, path.stat().st_size)
    assert (report.monitor, report.mode, report.seed) == ("acc", "max", 7)
    assert report.float_metrics == {"acc": 0.9}
    assert report.layers[0].sqnr_db > 20
    assert report.layers[0].histogram is not None


def test_bits_by_row_of_version_1_load_packed():
    path = HELD / "rows_of_0_bits.safetensors"
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 6)
    with torch.no_grad():
        wanted = load_quantized(path, nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)))
        packed = load_quantized(path, model, packed=True)
        for layer in (0, 2):
            assert torch.equal(packed[layer].weight, wanted[layer].weight)
        torch.testing.assert_close(packed(x), wanted(x), rtol=0, atol=1e-6)
