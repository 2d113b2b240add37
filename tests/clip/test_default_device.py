"""No tensor is made without a device, and none is moved: clipping goes on where everything new would be elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from clipquant.clip import (
    AGC,
    AdaGC,
    AutoClip,
    Chain,
    Indicator,
    Norm,
    Value,
    ZClip,
    clip_gradients_,
)
from clipquant.clip.apply import clip_assigned_
from clipquant.clip.assign import assign
from clipquant.clip.fold import fold_, unfold_
from clipquant.clip.progress import Progress

RULES = [
    Value(0.3),
    Indicator(0.4),
    Norm(0.5),
    Norm(0.5, 3.0, warmup_steps=2),
    Norm(0.5, "inf"),
    Norm(0.5, scope="tensor"),
    Norm(0.5, scope="group"),
    AGC(0.02),
    AGC(0.02, axis=1),
    AutoClip(40),
    ZClip(z=0.5, warmup=1, max_norm=0.7),
    AdaGC(ratio=0.8, warmup=1, max_norm=0.5),
    Chain(AGC(0.02), Norm(0.5)),
]
SIZES = {
    "small": [(4, 3), (7,), (2, 3, 3), (5, 4)],
    "large": [(300, 300), (70_000,), (9,), (4, 3), (4, 4), (6, 3)],
}


def refused(*_: Any, **__: Any) -> Any:
    raise AssertionError("a tensor was moved to the CPU")


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Make every tensor that names no device an empty one, and refuse to move any."""
    torch.set_default_device("meta")
    try:
        with patch.object(Tensor, "cpu", refused):
            yield
    finally:
        torch.set_default_device(None)


def params(kind: str, seed: int, bad: float | None = None) -> list[Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    found = [draw(shape).requires_grad_() for shape in SIZES.get(kind, SIZES["small"])]
    for param in found:
        param.grad = draw(tuple(param.shape))
        if kind == "half":
            param.data = param.data.half()
            param.grad = param.grad.half()
        if kind == "mixed" and param.ndim == 1:
            param.data, param.grad = param.data.double(), None
            param.grad = draw(tuple(param.shape)).double()
    if kind == "sparse":
        index = torch.tensor([[0, 2, 0]], device="cpu")
        found[0].grad = torch.sparse_coo_tensor(index, draw((3, 3)), (4, 3), device="cpu")
    if bad is not None:
        found[1].grad[3] = bad  # type: ignore[index]
    return found


@pytest.mark.parametrize("kind", ["small", "large", "half", "mixed", "sparse"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule_does_what_it_does_otherwise(kind: str, rule: Any, request: Any) -> None:
    if kind == "sparse" and rule == AGC(0.02, axis=1):
        pytest.skip("units of a sparse gradient lie along its first axis")

    def steps() -> list[Any]:
        state, found = None, []
        for step in range(2):
            own = params(kind, step)
            record = clip_gradients_(own, rule, state, on_nonfinite="skip", measure=True)
            state = record.state
            found += [param.grad.to_dense().tolist() for param in own]  # type: ignore[union-attr]
            found += [record.grad_norm, record.grad_norm_clipped, record.norms_clipped.tolist()]  # type: ignore[union-attr]
            found += [record.nonzero_share]
        return found

    expected = steps()
    request.getfixturevalue("elsewhere")
    assert steps() == expected


@pytest.mark.parametrize("policy", ["skip", "zero", "raise", "leave", "propagate"])
@pytest.mark.parametrize("rule", [Value(0.3), Norm(0.5), AGC(0.02), ZClip()], ids=repr)
@pytest.mark.usefixtures("elsewhere")
def test_every_policy_goes_on(policy: Any, rule: Any) -> None:
    own = params("large", 0, bad=math.nan)
    progress = Progress()
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="gradients in 1:"):
            clip_assigned_(assign(own, rule), on_nonfinite=policy)
        return
    record = clip_assigned_(assign(own, rule), on_nonfinite=policy, skip_above=1e9)
    progress = Progress.from_state_dict(progress.after(record, 0).state_dict())
    assert progress.steps == 1
    assert record.skipped == (policy == "skip")


@pytest.mark.usefixtures("elsewhere")
def test_a_fused_step_takes_its_coefficient() -> None:
    own = params("small", 0)
    optimizer = torch.optim.AdamW(own, fused=True)
    record = clip_assigned_(assign(own, Norm(0.5)), defer=True)
    assert record.deferred is not None
    fold_(optimizer, record.deferred, own[0].device)
    assert optimizer.grad_scale.device.type == "cpu"  # type: ignore[attr-defined]
    unfold_(optimizer)
