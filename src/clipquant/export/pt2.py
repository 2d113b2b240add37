"""A program that torch alone can load: weights as packed bytes, dequantized in the graph."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from clipquant.export.example import Example, largest_difference
from clipquant.export.parts.capture import capture, quiet
from clipquant.export.parts.format import Calls, Format
from clipquant.export.parts.record import ExportRecord
from clipquant.export.parts.subject import Subject
from clipquant.files import write_whole
from clipquant.quant.codes.weights import QuantizedWeights
from clipquant.quant.packed.modules import packed_copy


@dataclass(frozen=True)
class Pt2(Format):
    """A `torch.export` program, the weights as packed bytes of any width."""

    name = "pt2"
    suffix = ".pt2"

    def write(self, subject: Subject, path: str | Path) -> ExportRecord:
        model, example = subject.call()
        return export_pt2(model, subject.weights, example, path)

    def open(self, path: str | Path, threads: int | None = None) -> Calls:
        program = torch.export.load(path)
        module = program.module()
        args, kwargs = program.example_inputs or ((), {})
        example = Example(args, kwargs)
        fixed = not program.range_constraints

        def make(batch: int) -> Callable[[], Any] | None:
            if fixed and batch != example.batch_size:
                return None
            return partial(example.resized(batch).run, module)

        return make


def export_pt2(
    model: nn.Module, weights: QuantizedWeights, example: Example, path: str | Path
) -> ExportRecord:
    """Write a `torch.export` program whose quantized weights are packed integer buffers.

    `torch.export.load` reads it in a process that has only torch; its outputs are those of the
    dequantized model. It holds neither the example's values nor paths of this machine.

    Args:
        model: A module of the architecture that was quantized; not touched.
        weights: Its quantized weights.
        example: A call that it accepts.
        path: Name of the file, usually ending in `.pt2`.

    Returns:
        What was written, with the largest difference from the dequantized model's outputs.

    Raises:
        ExportError: If torch.export cannot capture the model.
        OSError: If the file cannot be written.

    >>> from tempfile import TemporaryDirectory
    >>> from clipquant.quant.quantize import quantize_weights
    >>> from clipquant.quant.recipe import Recipe
    >>> layer = nn.Linear(64, 32)
    >>> with TemporaryDirectory() as folder:
    ...     example = Example((torch.zeros(1, 64),))
    ...     export_pt2(layer, quantize_weights(layer, Recipe(4)), example, f"{folder}/a.pt2").difference
    0.0
    """
    packed = packed_copy(model, weights)
    captured = capture(packed, example)
    check = captured.check
    program = _anonymous(captured.program)
    data = _deflate(_bytes(program))
    with quiet():
        loaded = torch.export.load(BytesIO(data)).module()
    difference = largest_difference(check.run(packed), check.run(loaded))
    write_whole(path, data)
    return ExportRecord("pt2", str(path), len(data), difference, captured.notes)


def _anonymous(program: ExportedProgram) -> ExportedProgram:
    """Take out of a program what no reader of it needs: source lines, paths, the example's values."""
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta = {key: node.meta[key] for key in ("val",) if key in node.meta}
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        blank = Example(args, kwargs).map(torch.zeros_like)
        program.example_inputs = (blank.args, dict(blank.kwargs))
    return program


def _bytes(program: ExportedProgram) -> bytes:
    stream = BytesIO()
    with quiet():
        torch.export.save(program, stream)
    return stream.getvalue()


def _deflate(archive: bytes) -> bytes:
    """Return a zip archive with its entries compressed: most of a graph is repetition."""
    stream = BytesIO()
    with zipfile.ZipFile(BytesIO(archive)) as source, zipfile.ZipFile(stream, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED, 9)
    return stream.getvalue()
