"""The file: one `.safetensors` that says what it holds, proves it is whole, and loads anywhere."""

from clipquant.artifact.content import (
    Artifact,
    read_artifact,
    read_outline,
    save_artifact,
    serialize,
    serialized_size,
    verify_artifact,
)
from clipquant.artifact.envelope import FORMAT_VERSION, read_metadata
from clipquant.artifact.fault import ArtifactError
from clipquant.artifact.folder import claim_folder
from clipquant.artifact.load import load_quantized, load_state

__all__ = [
    "FORMAT_VERSION",
    "Artifact",
    "ArtifactError",
    "claim_folder",
    "load_quantized",
    "load_state",
    "read_artifact",
    "read_metadata",
    "read_outline",
    "save_artifact",
    "serialize",
    "serialized_size",
    "verify_artifact",
]
