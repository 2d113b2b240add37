"""Artifacts in the layouts of other packages."""

from __future__ import annotations

import warnings
from pathlib import Path

from clipquant.artifact import read_artifact
from clipquant.export.compressed_tensors import PackQuantized, to_pack_quantized


def to_compressed_tensors(path: str | Path, out: str | Path) -> PackQuantized:
    """Write an artifact's Linear layers in the layout that the compressed-tensors package reads.

    Codes and scales are kept. What the layout cannot hold, such as convolutions, is written
    dequantized, and a warning names it.

    Args:
        path: A file written by `QuantizedModel.save` or `QuantizeOnFitEnd`.
        out: Folder for `model.safetensors` and `config.json`.

    Returns:
        What was packed, and what was not and why.

    Raises:
        ArtifactError: If the file is missing, damaged or of a newer format.
        ExportError: If no weight fits the layout.
        OSError: If the folder cannot be written.
    """
    written = to_pack_quantized(read_artifact(path).weights, out)
    if written.dense:
        said = ", ".join(f"{name} ({why})" for name, why in written.dense.items())
        warnings.warn(f"{out}: written dequantized: {said}.", stacklevel=2)
    return written
