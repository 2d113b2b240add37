"""Nothing of a run aside reaches the user: not loggers, not the terminal, no warning twice."""

from __future__ import annotations

import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from clipquant.callbacks.lightning import package_of

_TALKERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "pytorch_lightning.utilities.rank_zero",
    "pytorch_lightning.accelerators.cuda",
)
OF_OTHERS = (
    ".*LeafSpec.*is deprecated.*"  # Lightning calls what torch has renamed; the fit has said so
)
_USELESS = (
    OF_OTHERS,
    # Advice on loaders that the fit has given already.
    ".*does not have many workers.*",
    ".*infer the `batch_size`.*",
    ".*Total length of .* across ranks is zero.*",
    ".*`persistent_workers=True`.*",
)
_PLACES = ("name", "version", "save_dir", "root_dir", "log_dir")  # that every logger has


class Silence:
    """Stand-ins for a Trainer's loggers, and what has been warned of.

    Args:
        trainer: The outer Trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        dummy = package_of(trainer).loggers.logger.DummyLogger
        self.loggers = [_silent(logger, dummy) for logger in trainer.loggers]
        self.stand_ins: list[tuple[Any, Any]] = list(
            zip(trainer.loggers, self.loggers, strict=True)
        )
        for logger, silent in tuple(self.stand_ins):
            with suppress(Exception):  # a logger without a handle
                self.stand_ins.append((logger.experiment, silent.experiment))
        self.warned: set[tuple[Any, str]] = set()

    def memo(self) -> dict[int, Any]:
        """Return the stand-ins as what `copy.deepcopy` takes instead of copying."""
        return {id(real): silent for real, silent in self.stand_ins}

    def hush_(self, module: pl.LightningModule) -> None:
        """Put the stand-ins in the place of the loggers and handles that a module holds."""
        memo = self.memo()
        for part in module.modules():
            own = vars(part)
            own.update({name: memo[id(held)] for name, held in own.items() if id(held) in memo})

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keep Lightning from announcing things anew, and tell each warning only the first time."""
        loggers = [logging.getLogger(name) for name in _TALKERS]
        levels = [logger.level for logger in loggers]
        said: list[warnings.WarningMessage] = []
        try:
            for logger in loggers:
                logger.setLevel(max(logger.level, logging.WARNING))
            with warnings.catch_warnings(record=True) as said:
                for message in _USELESS:
                    warnings.filterwarnings("ignore", message=message)
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            self._tell_(said)

    def _tell_(self, said: list[warnings.WarningMessage]) -> None:
        for item in said:
            key = (item.category, str(item.message))
            if key not in self.warned:
                self.warned.add(key)
                warnings.showwarning(item.message, item.category, item.filename, item.lineno)


def silently(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that prints nothing, of the same signature."""

    @functools.wraps(function)
    def silent(*args: Any, **kwargs: Any) -> Any:
        with redirect_stdout(io.StringIO()):
            return function(*args, **kwargs)

    return silent


def _silent(logger: Any, dummy: type) -> Any:
    """Return a logger that takes everything and writes nothing, with the plain attributes of another."""

    class Silent(dummy):  # type: ignore[misc]
        """Takes whatever is logged and keeps none of it."""

        def __getattr__(self, name: str) -> Any:
            value = _plain(logger, name)
            return super().__getattr__(name) if value is None else value

        def __deepcopy__(self, memo: Any) -> Any:
            return self

    for name in _PLACES:
        setattr(Silent, name, property(partial(_place, logger, name)))
    return Silent()


def _place(logger: Any, name: str, _silent: Any) -> Any:
    return _plain(logger, name)


def _plain(thing: Any, name: str) -> Any:
    """Return an attribute that is a name, a number or a path; nothing that could write."""
    with suppress(Exception):
        value = getattr(thing, name)
        if isinstance(value, (str, int, float, Path)):
            return value
    return None
