"""What Lightning's own tests of gradient clipping ask for, asked of the callback."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from clipquant import GradientClipCallback
from clipquant.clip import Norm, Value


class Classifier(pl.LightningModule):
    def __init__(self, automatic: bool = True, optimizers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)])
        self.automatic_optimization = automatic
        self.count = optimizers
        self.losses: list[float] = []

    def training_step(self, batch: Any, _: int) -> Tensor | None:
        x, y = batch
        for layer in self.layers:
            x = layer(x).tanh()
        loss = nn.functional.cross_entropy(10 * x, y)
        if self.automatic_optimization:
            return loss
        optimizers: Any = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return None

    def configure_optimizers(self) -> Any:
        if self.count == 1:
            return torch.optim.SGD(self.parameters(), lr=0.1)
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in self.layers], []

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(8, 4, generator=generator)
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, torch.arange(8) % 3), 2
        )


class Watch(pl.Callback):
    """Keeps the gradients of each step as the optimizer gets them."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.seen.append([p.grad.clone() for p in params if p.grad is not None])


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> list[list[Tensor]]:
    watch = Watch()
    quiet = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
    )
    options: Any = {"accelerator": "cpu", "max_epochs": 1, "max_steps": 3, **quiet, **settings}
    pl.Trainer(callbacks=[*callbacks, watch], **options).fit(module)
    return watch.seen


def norm_of(grads: list[Tensor]) -> Tensor:
    return torch.norm(torch.stack([torch.norm(grad.float(), 2) for grad in grads]), 2)


PRECISIONS = ["32-true", "bf16-mixed", "64-true"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradient_clipping_by_norm(precision: Any) -> None:
    seen = fit(Classifier(), GradientClipCallback(Norm(0.05)), precision=precision)
    assert len(seen) == 3
    for grads in seen:
        torch.testing.assert_close(norm_of(grads), torch.tensor(0.05), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradient_clipping_by_value(precision: Any) -> None:
    seen = fit(Classifier(), GradientClipCallback(1e-10), precision=precision)
    assert len(seen) == 3
    for grads in seen:
        largest = max(grad.abs().max().item() for grad in grads)
        assert largest == pytest.approx(1e-10, rel=1e-6)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_that_of_the_trainers_own_clipping(algorithm: Any, accumulate: int) -> None:
    ours, theirs = Classifier(), Classifier()
    rule = Norm(0.02) if algorithm == "norm" else Value(0.005)
    fit(ours, GradientClipCallback(rule), accumulate_grad_batches=accumulate)
    limit = 0.02 if algorithm == "norm" else 0.005
    fit(
        theirs,
        gradient_clip_val=limit,
        gradient_clip_algorithm=algorithm,
        accumulate_grad_batches=accumulate,
    )
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_under_manual_optimization_where_the_trainer_refuses() -> None:
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        fit(Classifier(automatic=False), gradient_clip_val=0.05)
    seen = fit(Classifier(automatic=False, optimizers=2), GradientClipCallback(Norm(0.05)))
    assert len(seen) >= 3
    for grads in seen:
        torch.testing.assert_close(norm_of(grads), torch.tensor(0.05), rtol=1e-4, atol=1e-6)


def test_a_module_that_clips_by_itself_comes_after() -> None:
    # Lightning: test_lightning_module_configure_gradient_clipping: the module's own hook decides what the step gets.
    class Own(Classifier):
        norms: list[Tensor]

        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            params = [p.grad for p in self.parameters() if p.grad is not None]
            self.norms = [*getattr(self, "norms", []), norm_of(params)]
            self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")

    module = Own()
    fit(module, GradientClipCallback(Norm(0.05)))
    assert len(module.norms) == 3
    for norm in module.norms:
        torch.testing.assert_close(norm, torch.tensor(0.05), rtol=1e-4, atol=1e-6)


def test_both_at_once_are_refused_naming_both() -> None:
    with pytest.raises(MisconfigurationException, match=r"clipped twice.*gradient_clip_val=0.05"):
        fit(Classifier(), GradientClipCallback(Norm(0.05)), gradient_clip_val=0.05)


@pytest.mark.parametrize("value", ["5", [1.0]])
def test_a_limit_of_another_type_is_refused_showing_it(value: Any) -> None:
    # Lightning: test_invalid_gradient_clip_value.
    with pytest.raises(TypeError, match="got"):
        GradientClipCallback(value)
