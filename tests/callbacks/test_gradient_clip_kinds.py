"""GradientClipCallback on gradients of every kind, in one module under a Trainer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from clipquant import GradientClipCallback
from clipquant.clip import AGC, AdaGC, AutoClip, Indicator, Norm, Value, ZClip

RULES: list[Any] = [
    Value(1e-3),
    Norm(1e-2),
    Norm(1e-2, "inf"),
    Norm(1e-2, scope="tensor"),
    AGC(1e-3),
    AutoClip(10),
    ZClip(max_norm=1e-2),
    AdaGC(max_norm=1e-2),
    Indicator(1e-3),
]


class Mixed(pl.LightningModule):
    """A sparse embedding, tied, frozen, empty, unused, complex, half precision and scalar parameters."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 4, sparse=sparse)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.unused = nn.Parameter(torch.ones(3))
        self.turn = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.short = nn.Parameter(torch.randn(4).bfloat16())
        self.scale = nn.Parameter(torch.tensor(2.0))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = self.frozen(self.second(self.first(self.embedding(batch))))
        x = (x * self.turn).abs() * self.short.float() * self.scale
        return x.square().mean() * (1 + 2 * batch_idx) + self.empty.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def named_gradients(self) -> dict[str, Tensor]:
        grads = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
        return {n: g.to_dense() if g.is_sparse else g for n, g in grads.items()}


class Words(torch.utils.data.Dataset[Tensor]):
    """Indices of words, some of them twice."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, index, index + 5, 11])


def fit(module: pl.LightningModule, callback: pl.Callback, **settings: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        max_epochs=1,
        callbacks=[callback],
        **settings,
    )
    trainer.fit(module, torch.utils.data.DataLoader(Words()))
    return trainer


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_sparse_gradients_train_as_dense_ones_beside_every_other_kind(rule: Any) -> None:
    sparse, dense = Mixed(sparse=True), Mixed(sparse=False)
    ours, theirs = GradientClipCallback(rule, log="params"), GradientClipCallback(rule)
    fit(sparse, ours)
    fit(dense, theirs)
    names = (
        "empty",
        "turn",
        "short",
        "scale",
        "embedding.weight",
        "first.weight",
        "first.bias",
        "second.bias",
    )
    assert ours.record.names == names
    for (name, a), b in zip(
        sparse.named_gradients().items(), dense.named_gradients().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert ours.record.grad_norm == pytest.approx(theirs.record.grad_norm, rel=1e-5)
    assert ours.record.clipped


@pytest.mark.parametrize("bad", ["embedding.weight", "turn", "short", "scale"])
@pytest.mark.parametrize("rule", [Value(1e-3), Norm(1e-2)], ids=repr)
def test_one_bad_gradient_of_any_kind_skips_the_step_for_all(rule: Any, bad: str) -> None:
    class Damaged(Mixed):
        def on_after_backward(self) -> None:
            if self.global_step == 1:
                grad = dict(self.named_parameters())[bad].grad
                (grad._values() if grad.is_sparse else grad).fill_(float("nan"))
                self.before = {n: p.detach().clone() for n, p in self.named_parameters()}

        def on_train_batch_end(self, *args: object) -> None:
            if self.trainer.global_step == 2:
                after = dict(self.named_parameters())
                assert all(torch.equal(after[n], p) for n, p in self.before.items())

    module, callback = Damaged(), GradientClipCallback(rule)
    fit(module, callback)
    progress = callback.state_dict()["optimizers"][0]
    assert (progress["steps"], progress["skipped_steps"]) == (3, 1)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_true_half_precision_under_every_rule(rule: Any, precision: Any) -> None:
    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(1, 6)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layer(batch.to(self.layer.weight.dtype).view(-1, 1)).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    half, whole = Plain(), Plain()
    ours, theirs = GradientClipCallback(rule), GradientClipCallback(rule)
    fit(half, ours, precision=precision)
    fit(whole, theirs)
    assert half.layer.weight.dtype is (
        torch.bfloat16 if precision == "bf16-true" else torch.float16
    )
    assert ours.record.grad_norm == pytest.approx(theirs.record.grad_norm, rel=0.03)
    assert ours.record.grad_norm_clipped == pytest.approx(theirs.record.grad_norm_clipped, rel=0.03)


def test_a_closure_given_to_a_manual_step_is_clipped_inside_the_step() -> None:
    class Closing(Mixed):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = super(Closing, self).training_step(batch, batch_idx)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    automatic, manual = Mixed(), Closing()
    fit(automatic, GradientClipCallback(Norm(1e-2)))
    fit(manual, GradientClipCallback(Norm(1e-2)))
    for a, b in zip(automatic.parameters(), manual.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
def test_a_tied_parameter_is_found_by_either_name(name: str) -> None:
    module = Mixed()
    fit(module, GradientClipCallback(1e-4, include=[name]))
    grads = module.named_gradients()
    assert float(grads["first.weight"].abs().max()) <= 1e-4
    assert float(grads["first.bias"].abs().max()) > 1e-4
