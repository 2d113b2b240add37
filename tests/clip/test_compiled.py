"""Compiled modules and compiled optimizer steps train as others do, clipped or not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from clipquant import GradientClipCallback
from clipquant.clip import AGC, Norm, Value, clip_gradients_
from clipquant.clip.fold import can_fold


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self(batch[0]).square().sum() * 50

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        data = torch.utils.data.TensorDataset(torch.randn(6, 3, generator=generator))
        return torch.utils.data.DataLoader(data, 2)


def fit(module: Any, rule: Any) -> tuple[list[Tensor], GradientClipCallback]:
    callback = GradientClipCallback(rule)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    own = getattr(module, "_orig_mod", module)
    return [p.detach().clone() for p in own.parameters()], callback


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("what", "rule"),
    [
        ("module", Value(0.1)),
        ("module", Norm(0.5)),
        ("submodule", AGC(0.05)),
    ],
)
def test_what_is_compiled_is_clipped_as_what_is_not(what: str, rule: Any) -> None:
    plain = Net()
    compiled: Any = copy.deepcopy(plain)
    if what == "module":
        compiled = torch.compile(compiled, backend="eager")
    else:
        compiled.body = torch.compile(compiled.body, backend="eager")
    ours, callback = fit(compiled, rule)
    theirs, reference = fit(plain, rule)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    record, other = callback.record, reference.record
    assert record is not None
    assert other is not None
    assert record.clipped
    assert record.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    assert record.names == ("body.weight", "body.bias", "head.weight", "head.bias")


@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_step_is_not_trusted_with_the_clipping(fused: bool) -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    ours, theirs = (torch.optim.SGD([w], lr=0.1, momentum=0.9, fused=fused) for w in weights)
    assert can_fold(ours) == fused
    ours.step = torch.compile(ours.step, backend="eager")  # type: ignore[method-assign]
    assert not can_fold(ours)
    for step in range(3):
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            weight.grad = torch.arange(3.0) + step
            record = clip_gradients_(optimizer, Norm(0.5))
            assert record.clipped
            optimizer.step()
    torch.testing.assert_close(*weights)


def test_clipping_itself_inside_a_compiled_function() -> None:
    weight = nn.Parameter(torch.zeros(2))

    @torch.compile(backend="eager")
    def step(grad: Tensor) -> Tensor:
        weight.grad = grad * 1.0
        clip_gradients_([weight], Value(1.0))
        return weight.grad

    assert step(torch.tensor([3.0, 0.5])).tolist() == [1.0, 0.5]
