"""Lightning's own commands, with this package's classes known by their short names."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from importlib.util import find_spec

from clipquant.cli.command import CommandError

TRAINER_COMMANDS = {
    "fit": "train the model of a YAML file: clipquant fit --config FILE",
    "validate": "run one validation epoch",
    "test": "run one test epoch",
    "predict": "run the model over the prediction data",
}


def run_trainer(args: Sequence[str]) -> int:
    """Run one of Lightning's commands, with this package's classes known by their short names."""
    if find_spec("jsonargparse") is None or find_spec("docstring_parser") is None:
        raise CommandError(
            f"clipquant {args[0]} needs jsonargparse[signatures]: pip install 'clipquant[cli]'."
        )
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    # Lightning calls names that jsonargparse and torch have renamed; users cannot act on that.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    from lightning.pytorch.cli import LightningCLI

    _import_names()
    try:
        # Without a logger the configuration would land in the working folder, and a second run stop at it.
        LightningCLI(args=list(args), save_config_kwargs={"overwrite": True})
    except MisconfigurationException as error:
        raise CommandError(error) from error
    return 0


def _import_names() -> None:
    # jsonargparse resolves a short class_path among the subclasses that are imported.
    import clipquant.clip
    import clipquant.reference

    for name in clipquant.__all__:
        getattr(clipquant, name)
