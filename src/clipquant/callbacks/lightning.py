"""Lightning under both of its names: `lightning.pytorch` and `pytorch_lightning`, one source released as two packages.

Their classes are not each other's: a Trainer of the one takes no module of the other, and an `isinstance` check against
the one fails for the other. Here stand the two things that code for both needs: a base for callbacks that is a
`Callback` of each package installed, and the package that a given object belongs to.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def callback_bases() -> tuple[type, ...]:
    """Return the `Callback` class of each package that is installed and can be imported, `lightning.pytorch` first."""
    try:
        other: type = import_module("pytorch_lightning").Callback
    except (
        Exception
    ):  # not installed, or beside a torch that it does not fit: nobody here can use it
        return (pl.Callback,)
    return (pl.Callback, other)


if TYPE_CHECKING:
    Callback = pl.Callback
else:

    class Callback(*callback_bases()):
        """A callback for Trainers of both packages; both bases define the same hooks, all of them empty."""


def package_of(thing: Any) -> ModuleType:
    """Return the package that an object of Lightning belongs to, to take further classes from.

    Args:
        thing: A Trainer, a LightningModule, a LightningDataModule, a strategy or a callback of either package, or
            of a class derived from one of theirs.

    Returns:
        The module `lightning.pytorch` or `pytorch_lightning`; for an object of both, the first.

    Raises:
        TypeError: It belongs to neither.

    Example:
        >>> package_of(pl.LightningModule()).__name__
        'lightning.pytorch'
    """
    for kind in type(thing).__mro__:
        for name in PACKAGES:
            if f"{kind.__module__}.".startswith(f"{name}."):
                return sys.modules[name]
    raise TypeError(
        f"{type(thing).__qualname__} is no class of Lightning: expected a Trainer, a module or a callback of "
        f"{' or '.join(PACKAGES)}"
    )


def is_overridden(hook: str, thing: Any) -> bool:
    """Return whether a module or a callback of either package has a hook of its own.

    Args:
        hook: Name of the hook.
        thing: A LightningModule or a Callback.

    Example:
        >>> is_overridden("on_fit_end", pl.LightningModule())
        False
    """
    own = getattr(type(thing), hook, None)
    if own is None or hook in vars(thing):
        return hook in vars(thing)
    package = package_of(thing)
    for parent in (package.LightningModule, package.Callback):
        if isinstance(thing, parent):
            return own is not getattr(parent, hook, None)
    return True
