"""Compiled modules, parts and steps: trained, clipped and quantized as those that are not, under the same keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clipquant import GradientClipCallback, QuantizeOnFitEnd, load_quantized, quantize
from clipquant.clip import AGC, Norm

WAYS = ["whole", "in place", "nested"]


class CompiledStep(torch.optim.SGD):
    """An optimizer whose update is compiled."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()  # backward, and the callbacks before the step
        if not hasattr(self, "update"):
            self.update = torch.compile(super().step, backend="eager")
        self.update()
        return loss


class Net(pl.LightningModule):
    """A body and a head; the body may be compiled."""

    def __init__(self, way: str = "", backend: str = "eager", step: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
        self.body: Any = body
        self.head = nn.Linear(16, 3)
        self.step, self.backend = step, backend
        if way == "part":
            self.body = torch.compile(body, backend=backend)
        if way == "nested":
            body[3] = torch.compile(body[3], backend=backend)
            self.body = torch.compile(body, backend=backend)
        if way == "in place":
            body.compile(backend=backend)

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x))

    def training_step(self, batch: Any, _: int) -> Any:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        kind = CompiledStep if self.step else torch.optim.SGD
        return kind(self.parameters(), 0.5, momentum=0.9)


def rows() -> Any:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8)


def fit(folder: Path, way: str = "", clip: Any = None, **named: Any) -> tuple[Any, Net]:
    """Return the callback and the module of a fit; the module as the user holds it."""
    torch._dynamo.reset()
    callback = QuantizeOnFitEnd(4, dirpath=folder, calibration_batches=2)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback, *([clip] if clip else [])], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder, num_sanity_val_steps=int(way == "nested"),
    )  # fmt: skip
    net = Net(way, **named)
    given = torch.compile(net, backend=net.backend) if way == "whole" else net
    trainer.fit(given, rows(), rows())
    return callback, net


@pytest.fixture(scope="module")
def plain(tmp_path_factory: Any) -> tuple[Any, Net]:
    return fit(tmp_path_factory.mktemp("plain"), clip=GradientClipCallback(Norm(0.1)))


@pytest.mark.parametrize("way", WAYS)
def test_the_file_is_that_of_the_module_that_is_not_compiled(
    way: str, plain: tuple[Any, Net], tmp_path: Path
) -> None:
    clip = GradientClipCallback(Norm(0.1))
    callback, net = fit(tmp_path, way, clip)
    assert callback.report.failures == ()
    expected = plain[0].artifact_path.read_bytes()
    assert callback.artifact_path.read_bytes() == expected
    assert clip.record.grad_norm_clipped == pytest.approx(0.1, rel=1e-4)
    own = {k.replace("_orig_mod.", ""): v for k, v in net.state_dict().items()}
    stored = load_quantized(callback.artifact_path)
    assert all(torch.equal(own[k], v) for k, v in stored.items())
    assert any("_orig_mod" in key for key in net.state_dict()) == (way == "nested")


def test_a_compiled_step_takes_the_clipped_gradients(
    plain: tuple[Any, Net], tmp_path: Path
) -> None:
    callback, net = fit(tmp_path, clip=GradientClipCallback(Norm(0.1)), step=True)
    for name, value in plain[1].state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert callback.report.failures == ()


def test_parameters_of_a_compiled_part_are_chosen_by_the_names_of_their_author(
    tmp_path: Path,
) -> None:
    clip = GradientClipCallback(AGC(0.001), include=["body.0.*"], log="params")
    net = fit(tmp_path, "nested", clip)[1]
    reference = fit(tmp_path / "plain", "", GradientClipCallback(AGC(0.001), include=["body.0.*"]))[
        1
    ]
    held = {k.replace("_orig_mod.", ""): v for k, v in net.state_dict().items()}
    assert all(torch.equal(v, held[k]) for k, v in reference.state_dict().items())


@pytest.mark.parametrize("way", ["part", "nested", "whole"])
def test_without_a_trainer_keys_are_the_same(way: str, tmp_path: Path) -> None:
    net = Net(way)
    held = torch.compile(net, backend="eager") if way == "whole" else net
    made = quantize(held, bits=4, exclude=["head.*"])
    assert made.report == quantize(Net(), bits=4, exclude=["head.*"]).report
    path = made.save(tmp_path / "net.safetensors")
    for target in (Net(), Net(way), torch.compile(Net(), backend="eager")):
        load_quantized(path, target)
        state = {k.replace("_orig_mod.", ""): v for k, v in target.state_dict().items()}
        assert all(torch.equal(state[k], v) for k, v in made.state_dict().items())
        made.apply_to(target)
