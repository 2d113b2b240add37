"""The file: one `.safetensors` that says what it holds, proves it is whole, and loads anywhere."""

from clipquant.artifact.content import (
    Artifact,
    load_quantized,
    load_state,
    read_artifact,
    save_artifact,
    serialize,
    serialized_size,
)
from clipquant.artifact.envelope import (
    FORMAT_VERSION,
    ArtifactError,
    read_metadata,
    verify_artifact,
)

__all__ = [
    "FORMAT_VERSION",
    "Artifact",
    "ArtifactError",
    "load_quantized",
    "load_state",
    "read_artifact",
    "read_metadata",
    "save_artifact",
    "serialize",
    "serialized_size",
    "verify_artifact",
]
