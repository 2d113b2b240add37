"""What a weight counts when weights are pruned: its size, or what training says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

_MEMORY = 0.99  # of the mean of what steps say


@dataclass(frozen=True)
class Criterion:
    """What steps say of a weight, by the product of weight and gradient.

    Args:
        said: What one step says; None: steps say nothing, the weight's size counts.
        mixed: What is known after a step, by what was known before and what it says.
    """

    said: Callable[[Tensor], Tensor] | None = None
    mixed: Callable[[Tensor, Tensor], Tensor] = torch.add


# Sanh et al. 2020, arXiv 2005.07683, equation 3; Molchanov et al. 2019, arXiv 1906.10771, equation 8.
CRITERIA: Mapping[str, Criterion] = {
    "magnitude": Criterion(),
    "movement": Criterion(torch.neg),
    "gradient": Criterion(torch.abs, lambda known, said: _MEMORY * known + (1 - _MEMORY) * said),
}


@dataclass
class Scores:
    """What each element of some weights counts, by one criterion.

    Args:
        criterion: "magnitude", "movement" or "gradient".
        seen: Name of a weight -> what steps have said of it so far.

    >>> Scores("magnitude").of({"w": torch.tensor([-2.0, 1.0])}, {})
    {'w': tensor([2., 1.])}
    """

    criterion: str
    seen: dict[str, Tensor] = field(default_factory=dict)

    def add_(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Take note of a step's gradients; one that is not finite says nothing."""
        own = CRITERIA[self.criterion]
        for name, weight in weights.items():
            if own.said is None or weight.grad is None or weight.grad.is_sparse:
                continue
            said = own.said(weight.detach().float() * weight.grad.float())
            if bool(said.isfinite().all()):
                self.seen[name] = own.mixed(self.seen[name], said) if name in self.seen else said

    def of(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the scores; what is pruned already counts least, so that it stays pruned."""
        found = {}
        for name, weight in weights.items():
            score = self.seen.get(name, weight.detach().float().abs())
            if name in masks:
                score = score.masked_fill(~masks[name].to(score.device), -torch.inf)
            found[name] = score
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs to go on."""
        return {name: seen.cpu() for name, seen in self.seen.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on from a state that `state_dict` gave."""
        self.seen = {name: seen.to(device) for name, seen in state.items()}
