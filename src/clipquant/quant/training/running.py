"""A network while it is trained quantized: its grids, the ranges of its inputs, what teaches it, and their steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clipquant.quant.codes.paths import parameter_at
from clipquant.quant.codes.tensor import dequantize
from clipquant.quant.codes.trained import TrainedGrid
from clipquant.quant.training.grid_steps import GridSteps, Mean
from clipquant.quant.training.learned_grid import LearnedGrid
from clipquant.quant.training.learned_range import LearnedRange
from clipquant.quant.training.swap import fed_weights, put_on, take_off
from clipquant.quant.training.tutor import Tutor

SEEN = 16  # batches of inputs from which their ranges begin


@dataclass
class Running:
    """What stands beside a network's own parameters while it is trained quantized.

    Args:
        grids: State-dict key of a weight -> its grid.
        inputs: State-dict key of a weight -> the range of what its layer is called with.
        tutor: The float network that teaches; None: nobody does.
        steps: What moves grids and ranges.
    """

    grids: dict[str, LearnedGrid]
    inputs: dict[str, LearnedRange] = field(default_factory=dict)
    tutor: Tutor | None = None
    steps: GridSteps = field(init=False)

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        first: Mapping[str, TrainedGrid],
        learn: bool,
        activations: bool = False,
        tutor: Tutor | None = None,
    ) -> Running:
        """Return a network's training at its start, put on.

        Args:
            model: The network.
            first: State-dict key of a weight -> the grid to begin with.
            learn: Whether grids and ranges are learned.
            activations: Whether inputs are quantized too.
            tutor: The float network that teaches.
        """
        grids = {name: LearnedGrid.of(grid, learn) for name, grid in first.items()}
        inputs = {}
        if activations:
            devices = {n: parameter_at(model, n).device for n in fed_weights(model, grids)}
            inputs = {name: LearnedRange.new(device, learn) for name, device in devices.items()}
        made = cls(grids, inputs, tutor)
        made._put_on_(model)
        return made

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], model: nn.Module, learn: bool, tutor: Tutor | None = None
    ) -> Running:
        """Return the training that `state_dict` was taken of, put on."""
        devices = {name: parameter_at(model, name).device for name in state["grids"]}
        grids = {
            name: LearnedGrid.from_state_dict(own, learn, devices[name])
            for name, own in state["grids"].items()
        }
        inputs = {
            name: LearnedRange.from_state_dict(own, learn, devices[name])
            for name, own in state.get("inputs", {}).items()
        }
        if tutor is not None:
            tutor.load_state_dict(state.get("float", {}))
        made = cls(grids, inputs, tutor)
        made._put_on_(model)
        if learn:
            made.steps.load_state_dict(state.get("steps", {}))
        return made

    def begin_inputs_(self, mean: Mean) -> None:
        """Begin to quantize inputs once their ranges have been seen on batches enough, all at the same time.

        Args:
            mean: Returns the mean of a tensor over all processes.
        """
        waiting = {n: r for n, r in self.inputs.items() if r.seen > 0}
        begun = any(learned.scale is not None for learned in waiting.values())
        if begun or max((r.seen for r in waiting.values()), default=0) < SEEN:
            return
        ends = mean(torch.stack([learned.ends for learned in waiting.values()]))
        for own, (name, learned) in zip(ends, waiting.items(), strict=True):
            learned.begin_(own)
            self.steps.add_(name, list(learned.leaves()))

    def step_(
        self, model: nn.Module, optimizer: Optimizer, share: float, factor: float, mean: Mean | None
    ) -> None:
        """Move the grids of the weights that an optimizer is about to move; see `GridSteps.step_`."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = [name for name in self.grids if id(parameter_at(model, name)) in own]
        self.steps.step_(names, share, factor, mean)

    def finish_(self, model: nn.Module) -> dict[str, TrainedGrid]:
        """Give the layers their classes back and the trained values to the weights; return the grids."""
        take_off(model)
        self.detach_()
        ends = {name: learned.now() for name, learned in self.inputs.items()}
        trained = {
            name: replace(grid.now().to(parameter_at(model, name).device), inputs=ends.get(name))
            for name, grid in self.grids.items()
        }
        hold_trained_(model, trained)
        return trained

    def detach_(self) -> None:
        """Follow what the network computes no more."""
        if self.tutor is not None:
            self.tutor.detach_()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on."""
        state = {
            "grids": {name: grid.state_dict() for name, grid in self.grids.items()},
            "inputs": {name: learned.state_dict() for name, learned in self.inputs.items()},
            "steps": self.steps.state_dict(),
        }
        return state if self.tutor is None else state | {"float": self.tutor.state_dict()}

    def _put_on_(self, model: nn.Module) -> None:
        put_on(model, self.grids, self.inputs)
        self.steps = GridSteps(self.grids)
        for name, learned in self.inputs.items():
            if learned.scale is not None:
                self.steps.add_(name, list(learned.leaves()))
        if self.tutor is not None:
            self.tutor.attach_(model)


def hold_trained_(model: nn.Module, trained: Mapping[str, TrainedGrid]) -> None:
    """Give weights the values that their trained grids make of them, in place.

    Args:
        model: Any module that holds them.
        trained: State-dict key -> grid.
    """
    with torch.no_grad():
        for name, grid in trained.items():
            parameter: Tensor = parameter_at(model, name)
            parameter.copy_(dequantize(grid.to(parameter.device).tensor(parameter)))
