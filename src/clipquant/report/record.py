"""All that a reporter may see: one frozen record of what was gained and what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from clipquant.quant.grid import dequantize
from clipquant.quant.layers import LeftInFloat
from clipquant.quant.model import QuantizedWeights
from clipquant.quant.pack import packed_bytes
from clipquant.quant.spec import QuantizedTensor


@dataclass(frozen=True)
class LayerRecord:
    """One quantized weight.

    Args:
        name: Its key in the state dict.
        shape: Its shape.
        bits: Width of its codes; the mean where rows differ.
        method: What chose the codes.
        sqnr_db: Signal to quantization noise, 10 log10(sum w^2 / sum (w - w_q)^2), in dB;
            infinite where nothing was lost.
        bytes: Of its codes, scales and zeros.
        note: What the reader should know, such as a fallback.
    """

    name: str
    shape: tuple[int, ...]
    bits: float
    method: str
    sqnr_db: float
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class QuantizationReport:
    """What was quantized, what it gained and what it cost.

    Args:
        layers: Every quantized weight.
        left: Every floating tensor that stayed as it was, and why.
        float_bytes: Bytes of all tensors of the float model, tied ones once.
        size_bytes: Bytes of the file.
        bits_per_weight: Bits of codes, scales and zeros over the number of quantized weights.
        float_metrics: Validation metrics of the float model.
        quantized_metrics: The same metrics of the quantized model, on the same batches.
        monitor: The metric that judges, where there is one.
        mode: Whether that metric is better when smaller ("min") or larger ("max").
        path: The file, once written.
    """

    layers: tuple[LayerRecord, ...]
    left: tuple[LeftInFloat, ...]
    float_bytes: int
    size_bytes: int
    bits_per_weight: float
    float_metrics: Mapping[str, float] = field(default_factory=dict)
    quantized_metrics: Mapping[str, float] = field(default_factory=dict)
    monitor: str | None = None
    mode: str | None = None
    path: str | None = None

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the float model."""
        return self.float_bytes / self.size_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-able values, infinities and NaN as null."""
        return {**_jsonable(asdict(self)), "ratio": self.ratio}


def layer_records(
    weights: QuantizedWeights, originals: Mapping[str, Tensor]
) -> tuple[LayerRecord, ...]:
    """Return one record a quantized weight.

    Args:
        weights: The quantized weights.
        originals: State-dict key -> float weight.
    """
    return tuple(
        LayerRecord(
            name,
            tensor.layout.shape,
            tensor.code_bits / max(tensor.numel, 1),
            tensor.method,
            sqnr_db(originals[name], dequantize(tensor)),
            stored_bytes(tensor),
        )
        for name, tensor in weights.tensors.items()
    )


def stored_bytes(tensor: QuantizedTensor) -> int:
    """Return the bytes of a weight's codes, scales, zeros and bits in the file."""
    parts = (tensor.scale, tensor.zero, tensor.bits)
    side = sum(part.nbytes for part in parts if isinstance(part, Tensor))
    return packed_bytes(tensor.bits, tuple(tensor.codes.shape)) + side


def bits_per_weight(tensors: Iterable[QuantizedTensor]) -> float:
    """Return the bits that a weight takes on average, its share of scales included."""
    tensors = list(tensors)
    return 8 * sum(map(stored_bytes, tensors)) / max(sum(t.numel for t in tensors), 1)


def sqnr_db(weight: Tensor, quantized: Tensor) -> float:
    """Return 10 log10(sum w^2 / sum (w - w_q)^2) in dB.

    >>> import torch
    >>> round(sqnr_db(torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 0.8])), 2)
    20.0
    """
    signal = float(weight.detach().double().square().sum())
    noise = float((weight.detach().double() - quantized.double()).square().sum())
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
