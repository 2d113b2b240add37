"""A logged metric over parts of the validation batches, whatever logs it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MaxMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score

from clipquant.callbacks.road.calibration import probe
from clipquant.callbacks.road.judge import PASSES, judge_parts
from clipquant.callbacks.road.parts import MOST
from clipquant.callbacks.road.road import open_road

SAMPLES, BATCH = 1210, 20  # 61 batches, the last of them half


def value(kind: str, scores: Tensor, labels: Tensor) -> Tensor:
    """The metric of one kind, by itself."""
    if kind == "loss":
        return F.cross_entropy(scores, labels)
    if kind == "f1":
        return MulticlassF1Score(3)(scores, labels)
    if kind == "auroc":
        return MulticlassAUROC(3)(scores.softmax(1), labels)
    return (scores.argmax(1) == labels).float().mean()


class Net(pl.LightningModule):
    """Logs one metric, in one of the ways that people do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer, self.steps = kind, nn.Linear(6, 3), 0
        self.objects = nn.ModuleDict(
            {"object": MulticlassAccuracy(3, average="micro"), "f1": MulticlassF1Score(3),
             "auroc": MulticlassAUROC(3), "largest": MaxMetric()}
        )  # fmt: skip
        self.ended: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        scores, name = self(x), self.kind
        self.steps += 1
        right = (scores.argmax(1) == y).float().mean()
        if name in ("object", "f1", "auroc"):
            self.objects[name].update(scores.softmax(1) if name == "auroc" else scores, y)
            self.log("m", self.objects[name])
        elif name == "largest":
            self.objects[name].update(right)
            self.log("m", self.objects[name])
        elif name == "end":
            self.ended += [right] * len(x)
        elif name == "both":
            self.log("m", right, on_step=True, on_epoch=True)
        else:
            self.log("m", F.cross_entropy(scores, y) if name == "loss" else right)

    def on_validation_epoch_end(self) -> None:
        if self.kind == "end":
            self.log("m", torch.stack(self.ended).mean())
            self.ended.clear()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 6)
    return x, (x @ torch.randn(6, 3) + torch.randn(SAMPLES, 3)).argmax(1)


def judged(kind: str, monitor: str = "m", count: int = SAMPLES, **how: Any) -> Any:
    module = Net(kind)
    x, y = data()
    loader = DataLoader(TensorDataset(x[:count], y[:count]), BATCH)
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        check_val_every_n_epoch=9,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    with open_road(trainer, module, probe) as road:
        before = road.guest.steps
        found = judge_parts(road, monitor, **how)
        assert road.guest.steps == before
    with torch.no_grad():
        return found, module.eval()(x), y


@pytest.mark.parametrize("kind", ["mean", "loss", "both", "object", "f1", "auroc"])
def test_what_a_step_logs_is_parted_in_the_pass_that_gives_the_whole(kind: str) -> None:
    found, scores, labels = judged(kind, "m_epoch" if kind == "both" else "m")
    name = "m_epoch" if kind == "both" else "m"
    parts = found.parts[name]
    batch = torch.arange(SAMPLES) // BATCH
    assert parts.samples == tuple(int((batch % MOST == n).sum()) for n in range(MOST))
    for number, without in enumerate(parts.without):
        others = batch % MOST != number
        wanted = float(value(kind, scores[others], labels[others]))
        assert without == pytest.approx(wanted, abs=2e-6)
    assert found.metrics[name] == pytest.approx(float(value(kind, scores, labels)), abs=2e-6)


def test_what_the_end_of_an_epoch_logs_is_parted_by_a_pass_for_each() -> None:
    found, scores, labels = judged("end", apart=True)
    right = (scores.argmax(1) == labels).float()
    parts = found.parts["m"]
    assert len(parts.samples) == PASSES
    assert sum(parts.samples) == 61
    assert found.metrics["m"] == pytest.approx(float(right.mean()), abs=1e-6)
    first = int(parts.samples[0]) * BATCH
    assert parts.means()[0] == pytest.approx(float(right[:first].mean()), abs=1e-5)
    assert judged("end")[0].parts == {}  # unless a second pass is asked for


@pytest.mark.parametrize("kind", ["mean", "end"])
def test_one_batch_has_no_parts_and_says_so(kind: str) -> None:
    found = judged(kind, count=BATCH, apart=True)[0]
    assert found.parts == {}
    assert "1 batch" in found.whole_only


def test_a_largest_value_is_no_mean_of_parts() -> None:
    found, scores, labels = judged("largest", apart=True)
    right = (scores.argmax(1) == labels).float()
    assert found.metrics["m"] == pytest.approx(float(max(p.mean() for p in right.split(BATCH))))
    assert found.parts == {}
    assert "no mean of its parts" in found.whole_only
    assert judged("mean", "other", apart=True)[0].parts == {}
