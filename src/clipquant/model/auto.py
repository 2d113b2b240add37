"""Bits for each row that meet budgets, judged by a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from clipquant.artifact import serialized_size
from clipquant.budget import meet
from clipquant.budget.chance import Judged
from clipquant.budget.goal import (
    Goal,
    check_budget,
    check_confidence,
    missed_size,
    refuse_below,
    size_in_bytes,
    spare_bytes,
)
from clipquant.errors import ArgumentError
from clipquant.model.quantized import QuantizedModel, make_report
from clipquant.quant.codes.coding import Coding, is_coded, with_coding
from clipquant.quant.codes.weights import QuantizedWeights
from clipquant.quant.harm import allocated_errors
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.layers import Target, check_finite
from clipquant.quant.network.twin import evaluating
from clipquant.quant.recipe import Recipe
from clipquant.quant.widths.allocator import allocator, smallest_weights
from clipquant.report.layers import unharmed
from clipquant.report.stored import describe


@dataclass(frozen=True)
class AutoBits:
    """What bits="auto" is asked: the budgets, the metric that judges, and what is quantized how.

    Args:
        max_drop: Most that the metric may lose.
        max_size: Most bytes of the file, see `size_in_bytes`.
        monitor: The metric.
        mode: Whether it is better when smaller ("min") or larger ("max").
        recipe: The other settings; its bits are not read.
        confidence: How sure it must be that `max_drop` is kept; None: within one standard error.
        coding: How the file holds codes.
    """

    max_drop: float | None
    max_size: int | float | str | None
    monitor: str
    mode: str
    recipe: Recipe = field(default_factory=Recipe)
    confidence: float | None = None
    coding: Coding = "dense"


@dataclass(frozen=True)
class Seen:
    """What bits="auto" chooses from.

    Args:
        fisher: Name of a weight -> E[g^2], (rows, columns).
        calibration: Batches, and how to run them.
    """

    fisher: Mapping[str, Tensor]
    calibration: Calibration


def quantize_auto(
    model: nn.Module,
    goal: AutoBits,
    seen: Seen,
    before: Judged,
    judge: Callable[[QuantizedWeights], Judged] | None,
) -> QuantizedModel:
    """Return `model` with bits for each row that meet the budgets, or come nearest to them.

    Args:
        model: In eval mode. It is run with other weights in their places, and ends as it was.
        goal: What is asked.
        seen: Sensitivities and calibration data.
        before: What was judged of the float model.
        judge: Judges the model with some weights; None: only a size can be met.

    Raises:
        ValueError: For what cannot be asked of this model; see `clipquant.budget.meet`.
    """
    selection = goal.recipe.select(model)
    check_finite(selection.targets)
    rows = allocator(
        model,
        selection,
        seen.fisher,
        seen.calibration,
        group_size=_group_size(goal),
        fixed=_given_widths(selection.targets, goal.recipe),
        coded=is_coded(goal.coding),
    )
    base = replace(
        make_report(rows.weights(rows.uniform(8)), model),
        float_metrics=dict(before.metrics),
        monitor=goal.monitor,
        mode=goal.mode,
    )
    most = None if goal.max_size is None else size_in_bytes(goal.max_size, base.float_bytes)
    spare = spare_bytes(len(seen.fisher), before.metrics, most)

    def size_of(weights: QuantizedWeights) -> int:
        return serialized_size(with_coding(weights, goal.coding), describe(base))

    asked = Goal(goal.max_drop, most, goal.monitor, goal.mode, goal.confidence)
    allocation = meet(asked, rows, size_of, before, judge, spare)
    with evaluating(model):
        errors = allocated_errors(rows, allocation.weights)
    weights = with_coding(replace(allocation.weights, errors=errors), goal.coding)
    report = make_report(weights, model, rows.sensitivities(allocation.bits))
    if asked.max_drop is not None and allocation.budget.met:  # the user's metric says what harm is
        report = replace(report, layers=tuple(map(unharmed, report.layers)))
    made = QuantizedModel(weights, report).reported(
        float_metrics=dict(before.metrics),
        quantized_metrics=dict(allocation.judged.metrics),
        drop_error=None if allocation.drop is None else allocation.drop.shown_error,
        monitor=goal.monitor if before.metrics else None,
        mode=goal.mode if before.metrics else None,
        budget=allocation.budget,
    )
    failure = allocation.budget.failure or missed_size(asked, made.report.size_bytes)
    return made.reported(budget=replace(allocation.budget, failure=failure))


def check_smallest(model: nn.Module, goal: AutoBits) -> None:
    """Raise for a size budget below what the model's shapes alone take, before anything is computed.

    Args:
        model: Any module, trained or not.
        goal: What is asked.

    Raises:
        BudgetError: Naming the smallest possible file.
    """
    selection = goal.recipe.select(model)
    fixed = _given_widths(selection.targets, goal.recipe)
    if goal.max_size is None:
        return
    weights = smallest_weights(model, selection, group_size=_group_size(goal), fixed=fixed)
    report = make_report(weights, model)
    count = len(selection.targets)
    bare = report.size_bytes + spare_bytes(count, {}, 0)
    smallest = report.size_bytes + spare_bytes(count, {}, bare * 100 // 99 + 100)
    refuse_below(size_in_bytes(goal.max_size, report.float_bytes), smallest)


def _group_size(goal: AutoBits) -> int | None:
    granularity = goal.recipe.granularity
    return granularity if isinstance(granularity, int) else None


def check_budgets(
    bits: object, max_drop: object, max_size: object, confidence: object = None
) -> None:
    """Raise unless budgets and bits="auto" come together.

    >>> check_budgets(4, None, "300kB")
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: budgets need bits='auto', which chooses the bits by them; got bits=4 with \
max_size='300kB'. Set bits='auto', or leave them out.
    """
    given = {"max_drop": max_drop, "max_size": max_size, "confidence": confidence}
    named = ", ".join(f"{k}={v!r}" for k, v in given.items() if v is not None)
    if bits != "auto" and named:
        raise ArgumentError(
            f"budgets need bits='auto', which chooses the bits by them; got bits={bits!r} with {named}. "
            "Set bits='auto', or leave them out."
        )
    if bits == "auto" and max_drop is None and max_size is None:
        raise ArgumentError("bits='auto' needs max_drop or max_size to choose by; got neither.")


def check_auto(
    max_drop: object, max_size: object, recipe: Recipe, confidence: object = None
) -> None:
    """Raise for settings that bits="auto" cannot obey, naming each with its remedy."""
    check_budgets("auto", max_drop, max_size)
    check_budget(max_drop, max_size)
    check_confidence(confidence, max_drop)
    wrong = {
        "method": recipe.method not in ("auto", "gptq"),
        "levels": recipe.levels is not None,
        "symmetric": bool(recipe.symmetric),
        "granularity": recipe.granularity == "tensor",
    }
    for name, bad in wrong.items():
        if bad:
            raise ArgumentError(
                f"bits='auto' gives each output channel a grid of its own, affine, its codes chosen by 'gptq'; got "
                f"{name}={getattr(recipe, name)!r}. Leave {name} out, or give bits as a number."
            )


def _given_widths(targets: Iterable[Target], recipe: Recipe) -> dict[str, int]:
    """Return the widths of the weights that are given one."""
    own = {name: recipe.override(name) for name in recipe.specs(targets)}
    return {name: bits for name, bits in own.items() if bits is not None}
