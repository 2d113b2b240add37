"""What makes a rule: three methods, wherever it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipquant.clip import Rule, clip_gradients_


def parameters(shapes: list[list[int]], seed: int, scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = scale * torch.randn(param.shape, generator=generator)
    return params


@dataclass(frozen=True)
class SignRule:
    """A rule of a user's own: the sign of each element, times the share of the step."""

    step_size: float = 0.1

    def init(self) -> dict[str, Tensor]:
        return {"steps": torch.zeros(())}

    def plan(
        self, grads: Any, params: Any, state: dict[str, Tensor]
    ) -> tuple[float, dict[str, Tensor]]:
        assert len(grads) == len(params)
        steps = state["steps"] + 1
        return self.step_size / float(steps), {"steps": steps}

    def clip(self, grad: Tensor, param: Tensor, plan: float) -> Tensor:
        return grad.sign() * plan


def test_a_rule_of_ones_own_needs_three_methods_and_no_base_class() -> None:
    (param,) = parameters([[4]], 7)
    signs = param.grad.sign()
    record = clip_gradients_(param, SignRule())
    assert torch.equal(param.grad, signs * 0.1)
    record = clip_gradients_(param, SignRule(), record.state)
    assert torch.equal(param.grad, signs * 0.05)
    assert record.clipped
    assert isinstance(SignRule(), Rule)


@pytest.mark.parametrize("missing", ["init", "plan", "clip"])
def test_a_class_without_one_of_the_three_is_no_rule(missing: str) -> None:
    methods = {name: lambda self: None for name in ("init", "plan", "clip") if name != missing}
    assert not issubclass(type("Half", (), methods), Rule)
