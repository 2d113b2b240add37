"""Figures of quantized weights beside the float weights they came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Grid, dequantize_rows, row_chunks
from clipquant.quant.codes.pack import packed_bytes
from clipquant.quant.codes.tensor import QuantizedTensor
from clipquant.quant.codes.weights import QuantizedWeights
from clipquant.quant.harm import harms
from clipquant.report.record import HARMED, Histogram, LayerRecord

BINS = 48
SAMPLE = 1 << 18  # weights that show the shape of a distribution to the height of a bar
_SMALL = 1e-12  # of a row: the squares of what adds to it are far from float32's smallest
FULL = 63  # the fullest bin, so that a count is one character of the file's metadata


def layer_records(
    weights: QuantizedWeights,
    originals: Mapping[str, Tensor],
    sensitivities: Mapping[str, float] | None = None,
) -> tuple[LayerRecord, ...]:
    """Return one record a quantized weight.

    Args:
        weights: The quantized weights.
        originals: State-dict key -> float weight.
        sensitivities: State-dict key -> expected increase of the loss.
    """
    records = [
        layer_record(
            name,
            tensor,
            sqnr_of(originals[name], tensor),
            (sensitivities or {}).get(name),
            histogram(originals[name], tensor),
        )
        for name, tensor in weights.tensors.items()
    ]
    return tuple(replace(record, note=_note(record, weights)) for record in records)


def _note(record: LayerRecord, weights: QuantizedWeights) -> str:
    """Return what is to be known of a weight, its likely harm first.

    Of rows of unlike width it is the outputs that tell: those that matter little have fewer bits, and the noise
    of a weight whose rows are not looked up says nothing.
    """
    own, name = weights.notes.get(record.name, ""), record.name
    if len(record.rows) > 1 and name not in weights.errors and name not in weights.lookups:
        return own
    why = harms(record.bits, record.sqnr_db, weights.errors.get(name))
    return "; ".join(filter(None, (f"{HARMED}: {why}" if why else "", own)))


def unharmed(record: LayerRecord) -> LayerRecord:
    """Return a record whose note does not begin with a likely harm.

    >>> unharmed(LayerRecord("w", (1,), 2, "gptq", 9.0, 1, note=f"{HARMED}: 9.0 dB SQNR; pruned")).note
    'pruned'
    """
    if not record.note.startswith(HARMED):
        return record
    return replace(record, note=record.note.partition("; ")[2])


def layer_record(
    name: str,
    tensor: QuantizedTensor,
    sqnr: float,
    sensitivity: float | None,
    bars: Histogram | None,
) -> LayerRecord:
    """Return the record of one weight, given what cannot be read off its codes."""
    return LayerRecord(
        name,
        tensor.layout.shape,
        tensor.code_bits / max(tensor.numel, 1),
        tensor.method,
        sqnr,
        sensitivity=sensitivity,
        rows=rows_by_width(tensor),
        histogram=bars,
        **coded_figures(tensor),
    )


def coded_figures(tensor: QuantizedTensor) -> dict[str, Any]:
    """Return the figures of a weight's record that depend on how a file holds its codes."""
    if tensor.stream is None:
        return {"bytes": stored_bytes(tensor), "coded_bits": None, "entropy": None}
    return {
        "bytes": stored_bytes(tensor),
        "coded_bits": 8 * tensor.stream.nbytes / max(tensor.numel, 1),
        "entropy": None if tensor.codes.is_meta else entropy(tensor),
    }


def entropy(tensor: QuantizedTensor) -> float:
    """Return the entropy of a weight's codes in bits a code, rows of one width together, each for itself.

    That is the least that a code of fixed probabilities can take: sum -p log2 p of their shares p.

    Source:
        Shannon 1948, "A Mathematical Theory of Communication".

    >>> from clipquant.quant.codes.grid import Coded
    >>> from clipquant.quant.codes.layout import Layout
    >>> grid = Grid(torch.ones(1, 1), None, 2, 4)
    >>> codes = torch.tensor([[1, 1, 1, 1], [0, 1, 2, 1]], dtype=torch.uint8)
    >>> round(entropy(QuantizedTensor(Coded(codes, grid), 2, Layout((2, 4)), torch.float32)), 3)
    1.061
    """
    bits = torch.as_tensor(tensor.bits, device=tensor.codes.device).expand(tensor.layout.rows)
    total = 0.0
    for width in bits.unique().tolist():
        count = torch.bincount(tensor.codes[bits == width].reshape(-1)).double()
        share = count[count > 0] / count.sum()
        total -= float((count[count > 0] * share.log2()).sum())
    return total / max(tensor.numel, 1)


def rows_by_width(tensor: QuantizedTensor) -> dict[int, int]:
    """Return width of a code -> number of rows that have it."""
    if isinstance(tensor.bits, int):
        return {tensor.bits: tensor.layout.rows}
    widths, counts = torch.unique(tensor.bits, return_counts=True)
    return dict(zip(widths.tolist(), counts.tolist(), strict=True))


def stored_bytes(tensor: QuantizedTensor) -> int:
    """Return the bytes of a weight's codes, scales, zeros and bits in the file."""
    parts = (tensor.scale, tensor.zero, tensor.bits, tensor.stream)
    side = sum(part.nbytes for part in parts if isinstance(part, Tensor))
    if tensor.stream is not None:
        return side
    return packed_bytes(tensor.bits, tuple(tensor.codes.shape)) + side


def bits_per_weight(tensors: Iterable[QuantizedTensor]) -> float:
    """Return the bits that a weight takes on average, its share of scales included."""
    tensors = list(tensors)
    return 8 * sum(map(stored_bytes, tensors)) / max(sum(t.numel for t in tensors), 1)


def sqnr_of(weight: Tensor, tensor: QuantizedTensor) -> float:
    """Return 10 log10(sum w^2 / sum (w - w_q)^2) in dB, a few rows in memory at a time.

    Args:
        weight: The float weight.
        tensor: What it was quantized to.

    Returns:
        Infinity where nothing was lost; minus infinity where an empty signal was.

    >>> from clipquant.quant.methods.rtn import quantize_weight
    >>> from clipquant.quant.codes.spec import QuantSpec
    >>> sqnr_of(torch.ones(2, 3), quantize_weight(torch.ones(2, 3), QuantSpec(8)))
    inf
    """
    matrix, grid = tensor.layout.fold(weight.detach()), tensor.grid
    signal = noise = 0.0
    for start, stop in row_chunks(*tensor.codes.shape):
        rows = matrix[start:stop]
        held = dequantize_rows(tensor.codes[start:stop], grid.rows(start, stop))
        signal += _energy(rows)
        noise += _energy(held.to(tensor.dtype).sub_(rows))
    return _decibels(signal, noise)


def _energy(values: Tensor) -> float:
    """Return the sum of squares; in float64 where float32's range might not hold those of a row."""
    rows = torch.atleast_2d(values.detach())
    norms = torch.linalg.vector_norm(rows if rows.element_size() > 2 else rows.float(), dim=1)
    if not bool(((norms > _SMALL) & (norms < 1 / _SMALL)).all()):
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return float(norms.double().square().sum())


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def histogram(weight: Tensor, tensor: QuantizedTensor) -> Histogram:
    """Return how a float weight's values lie, with the levels of its most typical row.

    Bins are counted over all values, or where there are more than 2**19, over 2**18 or so of them,
    evenly spread; they begin and end at the smallest and largest of all.

    Args:
        weight: The float weight.
        tensor: What it was quantized to.
    """
    values = weight.detach().flatten()
    low, high = (float(end) for end in values.aminmax())
    stride = len(values) // SAMPLE | 1  # odd: it does not fall on the same few columns of a matrix
    sample = values[::stride].float()
    counts = torch.histc(sample, BINS, low, high) if high > low else sample.new_ones(1)
    relative = (counts.double() * FULL / counts.max()).ceil().int().tolist()
    return Histogram(low, high, tuple(relative), *typical_values(tensor))


def typical_values(tensor: QuantizedTensor) -> tuple[tuple[float, ...], int]:
    """Return the values of the first group's grid in the row of median scale, and that row.

    The rows compared are those of the commonest width above 0 (0 where there is no other).
    """
    row = _typical_row(tensor)
    bits = int(tensor.bits[row]) if isinstance(tensor.bits, Tensor) else tensor.bits
    levels = tensor.levels if tensor.levels is not None else (1 << bits) - 1
    grid = tensor.grid
    zero = None if grid.zero is None else _pick(grid.zero, row)
    one = Grid(_pick(grid.scale, row), zero, levels, levels + 1)
    codes = torch.arange(levels + 1, dtype=torch.uint8, device=one.scale.device)[None]
    return tuple(dequantize_rows(codes, one)[0].tolist()), row


def _typical_row(tensor: QuantizedTensor) -> int:
    scales = tensor.scale[:, 0].abs().double().expand(tensor.layout.rows)
    index = torch.arange(tensor.layout.rows, device=scales.device)
    if isinstance(tensor.bits, Tensor):
        counts = torch.bincount(tensor.bits.long(), minlength=1)
        width = int(counts[1:].argmax()) + 1 if counts[1:].any() else 0
        index = (tensor.bits == width).nonzero().squeeze(1)
    return int(index[scales[index].median(dim=0).indices])


def _pick(part: Tensor, row: int) -> Tensor:
    return part[min(row, len(part) - 1), :1].reshape(1, 1)
