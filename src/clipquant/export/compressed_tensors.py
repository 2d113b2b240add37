"""Linear layers in the pack-quantized layout of the compressed-tensors package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import pad

from clipquant.export.example import ExportError
from clipquant.export.parts.format import Format
from clipquant.export.parts.record import ExportRecord
from clipquant.export.parts.subject import Subject
from clipquant.files import write_whole
from clipquant.quant.codes.pack import pack
from clipquant.quant.codes.tensor import QuantizedTensor, dequantize
from clipquant.quant.codes.weights import QuantizedWeights

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


@dataclass(frozen=True)
class CompressedTensors(Format):
    """A folder with Linear layers as the compressed-tensors package reads them."""

    name = "compressed-tensors"
    suffix = ".compressed-tensors"
    traces = False
    opens = False

    def write(self, subject: Subject, path: str | Path) -> ExportRecord:
        written = to_pack_quantized(subject.weights, path)
        size = sum(Path(path, name).stat().st_size for name in (WEIGHTS_FILE, CONFIG_FILE))
        notes = [f"written dequantized: {name} ({why})" for name, why in written.dense.items()]
        return ExportRecord(self.name, str(path), size, notes=tuple(notes))


@dataclass(frozen=True)
class PackQuantized:
    """What a file in the pack-quantized layout holds.

    Args:
        path: The `.safetensors` file; `config.json` beside it has the `quantization_config`.
        packed: Modules whose weights are packed.
        dense: State-dict key -> why that weight stands in the file dequantized.
    """

    path: str
    packed: tuple[str, ...]
    dense: Mapping[str, str]


def to_pack_quantized(weights: QuantizedWeights, out: str | Path) -> PackQuantized:
    """Write weights of two dimensions as compressed-tensors reads them, everything else dense.

    Codes and scales are kept as they are. The layout has no place for convolutions, for fractional
    zeros and for rows of different widths: such weights are written dequantized and named.

    Args:
        weights: Quantized weights.
        out: Folder for `model.safetensors` and `config.json`.

    Returns:
        What was packed, and what was not and why.

    Raises:
        ExportError: If no weight can be packed; says why and what would help.
        OSError: If the folder cannot be written.
    """
    dense = {
        name: why
        for name, tensor in weights.tensors.items()
        if (
            why := "looked up, not multiplied"
            if name in weights.lookups
            else why_dense(name, tensor)
        )
    }
    packed = {n: t for n, t in weights.tensors.items() if n not in dense}
    if not packed:
        said = "; ".join(f"{name}: {why}" for name, why in dense.items())
        raise ExportError(
            f"no weight fits the pack-quantized layout ({said}). Quantize Linear layers with "
            "symmetric=True."
        )
    state = {k: v.contiguous() for k, v in weights.floats.items()}
    state |= {name: dequantize(weights.tensors[name]) for name in dense}
    for name, tensor in packed.items():
        state |= pack_linear(name.removesuffix(".weight"), tensor)
    state |= {a: state[n].clone() for a, n in weights.aliases.items() if n in state}
    folder = Path(out)
    config = json.dumps({"quantization_config": _config(packed, dense)}, indent=1)
    write_whole(folder / WEIGHTS_FILE, safetensors.torch.save(state))
    write_whole(folder / CONFIG_FILE, config.encode())
    modules = tuple(name.removesuffix(".weight") for name in packed)
    return PackQuantized(str(folder / WEIGHTS_FILE), modules, dense)


def why_dense(name: str, tensor: QuantizedTensor) -> str:
    """Return why the layout cannot hold a weight; empty where it can."""
    if len(tensor.layout.shape) != 2 or not name.endswith(".weight"):
        return "not a Linear layer's weight"
    if isinstance(tensor.bits, Tensor):
        return "its rows differ in width"
    if tensor.layout.columns % tensor.group_size:
        return "its columns do not divide into groups"
    zero = tensor.zero
    if zero is None:
        return ""
    whole = (zero == zero.round()) & (zero >= 0) & (zero < 2**tensor.bits)
    return "" if bool(whole.all()) else "its zeros are fractional"


def pack_linear(module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """Return `weight_packed`, `weight_scale`, `weight_shape` and, where there is one, the zero point.

    Codes are stored offset by half their range, dense, each row from a 32-bit word of its own;
    zero points likewise, each column of them.
    """
    assert isinstance(tensor.bits, int)  # noqa: S101 - `why_dense` leaves out the others
    bits, levels = tensor.bits, tensor.levels or 0
    rows = tensor.layout.rows
    shift = 2 ** (bits - 1) - (levels + 1) // 2 if tensor.zero is None else 0
    scale = tensor.scale.expand(rows, -1).to(tensor.dtype)
    state = {
        "weight_packed": _words(tensor.codes + shift, bits),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor(tensor.layout.shape),
    }
    if tensor.zero is not None:
        zero = tensor.zero.expand(rows, -1).to(torch.uint8)
        state["weight_zero_point"] = _words(zero.T, bits).T.contiguous()
    return {f"{module}.{part}" if module else part: value for part, value in state.items()}


def _words(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of codes into whole 32-bit words."""
    rows, columns = codes.shape
    data = pack(pad(codes, (0, -columns % 32)).contiguous(), bits)
    words = data.reshape(rows, -1).view(torch.int32)
    return words[:, : (columns * bits + 31) // 32].contiguous()


def _config(packed: Mapping[str, QuantizedTensor], dense: Mapping[str, str]) -> dict[str, Any]:
    schemes: dict[str, dict[str, Any]] = {}
    for name, tensor in packed.items():
        grouped = tensor.scale.shape[1] > 1
        weights = {
            "num_bits": tensor.bits,
            "type": "int",
            "symmetric": tensor.symmetric,
            "strategy": "group" if grouped else "channel",
            "group_size": tensor.group_size if grouped else None,
        }
        scheme = schemes.setdefault(json.dumps(weights), {"weights": weights, "targets": []})
        scheme["targets"].append(name.removesuffix(".weight"))
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": scheme for i, scheme in enumerate(schemes.values())},
        "ignore": [name.removesuffix(".weight") for name in dense],
    }
