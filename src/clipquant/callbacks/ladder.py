"""The ladder: a way of quantizing that fails gives way to the next, down to plain rounding of what is finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from clipquant.callbacks.failures import Failure, Failures
from clipquant.callbacks.settings import Settings
from clipquant.model import QuantizedModel
from clipquant.quant.network.state import kept, seeded
from clipquant.quant.recipe import Recipe


@dataclass(frozen=True)
class Rung:
    """One way to quantize.

    Args:
        what: In words.
        run: Returns the quantized model.
    """

    what: str
    run: Callable[[], QuantizedModel]


def climb_down(
    rungs: Sequence[Rung], guest: nn.Module, failures: Failures, line: Callable[[], str]
) -> QuantizedModel | None:
    """Return what the first rung that does not fail gives; None where all fail.

    Args:
        rungs: The way asked for, then ever simpler ones.
        guest: Ends as it was, whatever a rung leaves.
        failures: Gets each failure.
        line: The line of code that does it later.
    """
    errors: list[str] = []
    made: QuantizedModel | None = None
    while made is None and len(errors) < len(rungs):
        made = _tried(rungs[len(errors)], guest, errors)
    if errors:
        instead, remedy = "nothing was quantized", f"Later: {line()}"
        if made is not None:
            instead = f"{rungs[len(errors)].what} was done instead"
            remedy = "Mend it and quantize anew from a checkpoint, or ask for that at once."
        said = "; ".join(dict.fromkeys(errors))
        failures.add_(Failure(rungs[0].what, said, instead, remedy))
    return made


def _tried(rung: Rung, guest: nn.Module, errors: list[str]) -> QuantizedModel | None:
    try:
        with kept(guest, parameters=True), seeded(0):
            return rung.run()
    except Exception as error:  # whatever user code that a method runs raises
        errors.append(f"{type(error).__name__}: {error}")
    return None


def data_free_rungs(
    settings: Settings, guest: nn.Module, quantize: Callable[..., QuantizedModel]
) -> list[Rung]:
    """Return the ways that look at the weights alone: the best, plain rounding, and without what is not finite."""
    recipe = settings.plain
    rungs = [
        Rung("quantizing without data", lambda: _free(settings, quantize, recipe, guest)),
        Rung(
            "rounding to nearest",
            lambda: _free(settings, quantize, replace(recipe, method="rtn"), guest),
        ),
    ]
    broken = not_finite(guest)
    if broken:
        exclude = [*(recipe.exclude or ()), *broken]
        left = replace(recipe, method="auto", exclude=exclude, overrides=None)
        what = f"leaving {', '.join(broken)} in float, not being finite,"
        rungs = [rungs[0], Rung(what, lambda: _free(settings, quantize, left, guest))]
    return rungs


def _free(
    settings: Settings, quantize: Callable[..., QuantizedModel], recipe: Recipe, guest: Any
) -> QuantizedModel:
    """Return a module quantized without data; with a size to keep, at the widest bits that keep it."""
    made = quantize(recipe, guest, None)
    for bits in range(recipe.bits - 1, 0, -1):
        if settings.fits(made.report):
            break
        made = quantize(replace(recipe, bits=bits), guest, None)
    return settings.unjudged(made)


def not_finite(module: nn.Module) -> list[str]:
    """Return the names of parameters that hold NaN or infinity.

    >>> model = nn.Linear(2, 1)
    >>> _ = nn.init.constant_(model.weight, torch.inf)
    >>> not_finite(model)
    ['weight']
    """
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all())
    ]
