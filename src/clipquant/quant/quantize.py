"""A whole model's weights in, codes out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from clipquant.errors import ArgumentError, ArgumentTypeError
from clipquant.quant.codes.grid import Coded
from clipquant.quant.codes.tensor import QuantizedTensor
from clipquant.quant.codes.weights import QuantizedWeights, rest_of
from clipquant.quant.codes.zeros import is_pruned, kept_zeros, lost_zeros, with_zero
from clipquant.quant.harm import output_errors
from clipquant.quant.methods import Found, Problem
from clipquant.quant.methods.auto import PLENTY
from clipquant.quant.methods.base import matrix_of, reads_data, solved
from clipquant.quant.network.batchnorm import reestimate
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.layers import lookups_of
from clipquant.quant.network.twin import Twin, evaluating
from clipquant.quant.recipe import Recipe, data_free


def quantize_weights(
    model: nn.Module, recipe: Recipe | None = None, calibration: Calibration | None = None
) -> QuantizedWeights:
    """Return the weights of `model` as codes on their grids; the model ends as it was.

    Args:
        model: It is run in eval mode with other weights in their places, and put back.
        recipe: The settings. None: 8 bits.
        calibration: Batches, and how to run them. None: data-free.

    Raises:
        ValueError: For a glob without a match, a model without weights to quantize, weights or
            activations that are not finite, or a method that lacks its batches.
        RuntimeError: If the model cannot run on a batch.
        TypeError: If a method of the user's own returns something else than codes for every weight.

    >>> weights = quantize_weights(nn.Linear(3, 2), Recipe(bits=4))
    >>> sorted(weights.tensors), sorted(weights.floats)
    (['weight'], ['bias'])
    """
    recipe = recipe or Recipe()
    calibration = calibration or None
    if recipe.needs_data and calibration is None:
        raise ArgumentError(
            f"method={recipe.solver.name!r} calibrates on data; got none. Pass data (or "
            f"calibration_batches above 0), or choose {data_free()}."
        )
    selection = recipe.select(model)
    specs = recipe.specs(selection.targets)
    trained = {
        t.name: recipe.trained[t.name].tensor(t.weight)
        for t in selection.targets
        if t.name in recipe.trained
    }
    if recipe.symmetric is None:
        pruned = (t.name for t in selection.targets if is_pruned(t.weight))
        specs |= {name: with_zero(specs[name]) for name in pruned}
    problem = Problem(model, selection.targets, specs, calibration)
    problem = problem.given(Found({name: tensor.coded for name, tensor in trained.items()}))
    found = Found({})
    if problem.targets:
        with evaluating(model):
            found = solved(recipe.solver, problem)
    _check(found, problem, recipe.solver.name)
    found = _with_zeros(found, problem)
    if recipe.granularity is None:
        for name, spec in specs.items():
            if isinstance(spec.granularity, int) and name not in trained:
                said = f"a scale for every {spec.granularity} weights: one a channel would not hold"
                found = found.noted([name], said)
    own = {
        target.name: QuantizedTensor(
            found.codes[target.name],
            specs[target.name].width,
            target.layout,
            target.weight.dtype,
            found.methods[target.name],
        )
        for target in problem.targets
    }
    own |= trained
    tensors = {target.name: own[target.name] for target in selection.targets}
    floats = rest_of(model, tensors, selection.aliases)
    floats |= {name: bias for name, bias in found.biases.items() if name in floats}
    notes = {name: "; ".join(said) for name, said in found.notes.items()}
    lookups = lookups_of(model, selection.targets)
    weights = QuantizedWeights(tensors, floats, selection.aliases, selection.left, notes, lookups)
    if calibration is None or trained:  # whose BatchNorm statistics were trained with them
        return weights
    with evaluating(model):
        statistics = reestimate(Twin(model), problem.twin(found), calibration)
        judged = {
            name
            for name, spec in specs.items()
            if spec.width < PLENTY and reads_data(recipe.solver, spec)
        }
        errors = output_errors(problem, found, statistics, calibration) if judged else {}
    kept = {name: error for name, error in errors.items() if name in judged - lookups}
    return replace(weights.following(statistics), errors=kept)


def _with_zeros(found: Found, problem: Problem) -> Found:
    """Return the same codes with the zeros of pruned weights kept, or a note of how many are lost."""
    pairs = [(t, found.codes[t.name]) for t in problem.targets]
    for target, coded in (*pairs, *problem.fixed.values()):
        if not is_pruned(target.weight):
            continue
        matrix, own = matrix_of(target), target.name in found.codes
        if own and coded.grid.zero is None:
            coded = kept_zeros(coded, matrix)
            found = replace(found, codes={**found.codes, target.name: coded})
        zeros, lost = int((matrix == 0).sum()), lost_zeros(coded, matrix)
        share = f"{zeros:,} zeros ({zeros / matrix.numel():.1%})"
        said = f"{'pruned: ' if own else ''}{share} kept by a grid with an exact zero"
        if lost:
            said = f"pruned: {lost:,} zeros lost, the grid has none; symmetric=True and 2 bits keep them"
        found = found.noted([target.name], said)
    return found


def _check(found: Found, problem: Problem, method: str) -> None:
    """Raise unless a method gave codes for every weight, on a grid that can hold it."""
    for target in problem.targets:
        name, layout = target.name, target.layout
        coded = found.codes.get(name)
        if not isinstance(coded, Coded):
            raise ArgumentTypeError(
                f"method {method!r} must give codes (Coded) for every weight; got "
                f"{type(coded).__name__} for {name}. Return them in Found.codes."
            )
        codes, scale = coded.codes, coded.grid.scale
        shape, steps = (layout.rows, layout.columns), problem.specs[name].steps
        groups = -(-layout.columns // max(coded.grid.group_size, 1))
        if codes.dtype != torch.uint8 or tuple(codes.shape) != shape:
            raise ArgumentTypeError(
                f"method {method!r} must give uint8 codes of shape {shape} for {name}; got "
                f"{codes.dtype} of {tuple(codes.shape)}."
            )
        if scale.shape[0] not in (1, shape[0]) or scale.shape[1] != groups:
            raise ArgumentTypeError(
                f"method {method!r} must give {name} a scale of shape ({shape[0]} or 1, {groups}) for its "
                f"group size of {coded.grid.group_size}; got {tuple(scale.shape)}."
            )
        if coded.grid.levels != steps:
            raise ArgumentTypeError(
                f"method {method!r} must keep the grid asked for, {steps} steps for {name}; got "
                f"{coded.grid.levels}."
            )
