"""The steps that grids take beside the user's own optimizers, which never see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clipquant.quant.training.learned_grid import LearnedGrid

RATE = 2e-3  # of a scale's logarithm and of a zero, at the largest rate of the user's own optimizer

Mean = Callable[[Tensor], Tensor]


class GridSteps:
    """Adam over the scales and zeros of some grids.

    They are in no optimizer of the user's own, whose state and schedules stay what they are without.

    Args:
        grids: Name of a weight -> its grid.
        rate: The rate where the user's own is largest.

    Source:
        Kingma and Ba 2015, arXiv 1412.6980.
    """

    def __init__(self, grids: Mapping[str, LearnedGrid], rate: float = RATE) -> None:
        self.leaves = {name: list(grid.leaves()) for name, grid in grids.items()}
        self.rate = rate
        all_leaves = [leaf for leaves in self.leaves.values() for leaf in leaves]
        self.optimizer = torch.optim.Adam(all_leaves, lr=rate) if all_leaves else None

    def add_(self, name: str, leaves: Sequence[Tensor]) -> None:
        """Let what else belongs to a weight, such as the range of its inputs, be moved with its grid."""
        if self.optimizer is not None and leaves:
            self.leaves[name] = [*self.leaves[name], *leaves]
            self.optimizer.add_param_group({"params": list(leaves), "lr": self.rate})

    def step_(self, names: Sequence[str], share: float, factor: float, mean: Mean | None) -> None:
        """Move the grids of some weights by their gradients, which are used up.

        Args:
            names: The weights that the user's own optimizer is about to move.
            share: Of the rate.
            factor: What the gradients were multiplied by.
            mean: Returns the mean of a tensor over all processes; None: there is one.
        """
        leaves = [leaf for name in names for leaf in self.leaves[name]]
        if self.optimizer is None or not leaves:
            return
        slopes = torch.cat([_slope(leaf).reshape(-1) for leaf in leaves])
        if mean is not None:
            slopes = mean(slopes)
        slopes = slopes / factor
        others = [leaf for own in self.leaves.values() for leaf in own]
        waiting = {id(leaf): leaf.grad for leaf in others}
        for leaf in others:
            leaf.grad = None
        if bool(slopes.isfinite().all()):
            sizes = [leaf.numel() for leaf in leaves]
            for leaf, slope in zip(leaves, slopes.split(sizes), strict=True):
                leaf.grad = slope.reshape(leaf.shape).to(leaf.dtype)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * share
            self.optimizer.step()
        for leaf in others:
            leaf.grad = waiting[id(leaf)]
        for leaf in leaves:
            leaf.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on."""
        return {} if self.optimizer is None else self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` gave."""
        if self.optimizer is not None and state:
            self.optimizer.load_state_dict(dict(state))


def _slope(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
