"""A rule defined here alone: in Python, through the callback, and by class_path in a YAML file on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from clipquant import GradientClipCallback, TwoConvNet, clip_gradients_
from clipquant.cli import main

# In an installed package this is a file of clipquant/clip/rules/ and a line in its __init__.py.
RULE = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Halve:
    factor: float = 0.5

    def init(self):
        return {}

    def plan(self, grads, params, state):
        return self.factor, state

    def clip(self, grad, param, plan):
        return grad * plan
"""

YAML = """
seed_everything: 0
trainer:
  max_steps: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: GradientClipCallback
      init_args:
        rule:
          class_path: toy_rule.Halve
          init_args:
            factor: 0.125
    - class_path: toy_rule_keeper.Keeper
model:
  class_path: TwoConvNet
data:
  class_path: toy_rule_keeper.Data
"""

KEEPER = """
import lightning.pytorch as pl
import torch

SEEN = []

class Keeper(pl.Callback):
    def on_before_zero_grad(self, trainer, module, optimizer):
        if module.fc2.bias.grad is not None:
            SEEN.append((trainer.callbacks[0].rule, trainer.callbacks[0].record))

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        images, labels = torch.randn(8, 1, 28, 28), torch.arange(8)
        data = torch.utils.data.TensorDataset(images, labels)
        return torch.utils.data.DataLoader(data, 4)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "toy_rule.py").write_text(RULE)
    (tmp_path / "toy_rule_keeper.py").write_text(KEEPER)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("toy_rule", "toy_rule_keeper"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    import toy_rule

    return toy_rule


def test_in_python(toy: Any) -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([4.0, -2.0])
    record = clip_gradients_(weight, toy.Halve(0.25), measure=True)
    assert weight.grad.tolist() == [1.0, -0.5]
    assert record.clip_coef == pytest.approx(0.25)


def test_through_the_callback(toy: Any) -> None:
    seen: list[Tensor] = []

    class Reading(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            seen.append(module.fc2.bias.grad.clone())

    data = [(torch.randn(2, 1, 28, 28), torch.tensor([1, 2]))]
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Reading(), GradientClipCallback(toy.Halve(0.25)), Reading()],
    )
    trainer.fit(TwoConvNet(), torch.utils.data.DataLoader(data, batch_size=None))
    assert torch.equal(seen[1], seen[0] * 0.25)


def test_by_class_path_on_the_command_line(toy: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(YAML)
    assert main(["fit", "--config", str(config)]) == 0
    import toy_rule_keeper

    assert toy_rule_keeper.SEEN
    for rule, record in toy_rule_keeper.SEEN:
        assert rule == toy.Halve(0.125)
        assert record.clip_coef == pytest.approx(0.125)
