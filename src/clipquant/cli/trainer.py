"""Lightning's own commands, with this package's classes known by their short names."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from clipquant.cli.command import CommandError, UsageError
from clipquant.cli.mistakes import told
from clipquant.errors import how_to_install

TRAINER_COMMANDS = {
    "fit": "train the model of a YAML file: clipquant fit --config FILE",
    "validate": "run one validation epoch",
    "test": "run one test epoch",
    "predict": "run the model over the prediction data",
    "quantize": "quantize a trained checkpoint: clipquant quantize --config FILE --ckpt_path CHECKPOINT",
}


def run_trainer(args: Sequence[str]) -> int:
    """Run one of Lightning's commands, with this package's classes known by their short names."""
    if find_spec("jsonargparse") is None or find_spec("docstring_parser") is None:
        raise CommandError(
            f"clipquant {args[0]} needs jsonargparse[signatures]: {how_to_install('cli')}"
        )
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    # Lightning calls names that jsonargparse and torch have renamed; users cannot act on that.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    from clipquant.cli.checkpoint import CheckpointCLI, CheckpointTrainer

    _import_names()
    _find_own_modules()
    told_elsewhere = {"exit_on_error": False}
    try:
        CheckpointCLI(
            trainer_class=CheckpointTrainer,
            args=list(args),
            # Without a logger the configuration would land in the working folder, and a second run stop at it.
            save_config_kwargs={"overwrite": True},
            parser_kwargs=dict.fromkeys(TRAINER_COMMANDS, told_elsewhere) | told_elsewhere,
        )
    except argparse.ArgumentError as error:
        raise UsageError(told(str(error))) from error
    except MisconfigurationException as error:
        raise CommandError(error) from error
    return 0


def _find_own_modules() -> None:
    """Let a configuration name a class of a file in the current folder, as `python -m` would."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def _import_names() -> None:
    # jsonargparse resolves a short class_path among the subclasses that are imported.
    import clipquant.clip
    import clipquant.reference

    for name in clipquant.__all__:
        getattr(clipquant, name)
