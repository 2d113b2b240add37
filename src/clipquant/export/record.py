"""What one export came to: its file, what it cost, what its reader should know."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ExportRecord:
    """One exported file, or why there is none.

    Args:
        format: "pt2", "onnx" or "onnx-int8".
        path: The file; None where it could not be made.
        bytes: Its size.
        difference: Largest absolute difference between its outputs and the quantized model's on
            the example input, in the units of the outputs.
        notes: What the reader should know, such as codes stored wider than they are.
        metrics: The validation metrics measured on the file itself.
        latency: Name of a measured figure, such as "batch 1, ratio" -> milliseconds or ratio.
        error: Why there is no file.
    """

    format: str
    path: str | None = None
    bytes: int = 0
    difference: float | None = None
    notes: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    latency: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-able values.

        >>> ExportRecord("pt2", error="no graph").to_dict()["error"]
        'no graph'
        """
        return asdict(self)


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file so that its name stands for the old bytes or the new, never for a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
