"""A copy serves as guest only where it is independent; whatever is run leaves the module as it was."""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from clipquant import QuantizeOnFitEnd, load_quantized
from clipquant.callbacks.road.calibration import probe
from clipquant.callbacks.road.judge import judge
from clipquant.callbacks.road.road import open_road


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def loss(self, batch: Any) -> Any:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, _: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Closure(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act = lambda x: self.net(x)

    def forward(self, x: Any) -> Any:
        return self.act(x)


class Functional(Net):
    """Reads the original's weights without calling a module of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = lambda x: nn.functional.linear(x, self.net[0].weight)

    def forward(self, x: Any) -> Any:
        return self.net[1:](self.first(x))


class Hook(Net):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Any] = {}
        self.net.register_forward_hook(lambda _m, _a, out: self.kept.update(out=out))

    def forward(self, x: Any) -> Any:
        self.net(x)
        return self.kept["out"]


class Weak(Net):
    def __init__(self) -> None:
        super().__init__()
        self.me = weakref.ref(self)

    def forward(self, x: Any) -> Any:
        return self.me().net(x)


class Compiled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fast = torch.compile(self.net.forward, backend="eager")

    def forward(self, x: Any) -> Any:
        return self.fast(x)


class Locked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Partial(Net):
    """A bound method in a partial is copied with its module."""

    def __init__(self) -> None:
        super().__init__()
        self.call = functools.partial(self.run)

    def run(self, x: Any) -> Any:
        return self.net(x)

    def forward(self, x: Any) -> Any:
        return self.call(x)


class Scripted(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fast = torch.jit.trace(self.net, torch.randn(2, 8))

    def forward(self, x: Any) -> Any:
        return self.fast(x)


def rows() -> Any:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 16)


def fit(net: Any, tmp_path: Any, *callbacks: Any, **given: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=list(callbacks), default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **{"logger": False, **given},
    )  # fmt: skip
    trainer.fit(net, rows(), rows())
    return trainer


@pytest.mark.parametrize(
    ("kind", "copied"),
    [(Net, True), (Partial, True), (Closure, False), (Functional, False), (Hook, False),
     (Weak, False), (Compiled, False), (Locked, False)],
)  # fmt: skip
def test_only_an_independent_copy_is_the_guest(kind: Any, copied: bool, tmp_path: Any) -> None:
    net = kind()
    with open_road(fit(net, tmp_path), net, probe) as road:
        assert (road.guest is not net) == copied


@pytest.mark.parametrize(
    "kind", [Closure, Functional, Hook, Weak, Compiled, Locked, Partial, Scripted]
)
def test_the_report_is_of_the_weights_in_the_file(kind: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    net, callback = kind(), QuantizeOnFitEnd(1, method="rtn", dirpath=tmp_path)
    fit(net, tmp_path, callback)
    true = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    found = true.validate(load_quantized(callback.artifact_path, net), rows(), verbose=False)[0]
    assert callback.report.quantized_metrics["val_loss"] == pytest.approx(found["val_loss"], abs=0)
    assert callback.report.drop != 0


@pytest.mark.parametrize("inplace", [False, True])
def test_a_compiled_module_is_judged(inplace: bool, tmp_path: Any) -> None:
    net, callback = Net(), QuantizeOnFitEnd(1, method="rtn", dirpath=tmp_path)
    if inplace:
        net.compile(backend="eager")
    fit(net if inplace else torch.compile(net, backend="eager"), tmp_path, callback)
    with torch.no_grad():
        fresh = load_quantized(callback.artifact_path, Net())
        true = sum(float(fresh.loss(batch)) for batch in rows()) / 4
    assert callback.report.quantized_metrics["val_loss"] == pytest.approx(true, rel=1e-6)
    assert callback.report.failures == ()


class Collects(Net):
    """Keeps all that a step can keep."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.register_buffer("count", torch.zeros(()))
        self.outputs: list[Any] = []
        self.cache: dict[str, Any] = {}
        self.steps = 0
        self.box = Box()

    def validation_step(self, batch: Any, index: int) -> None:
        loss = self.loss(batch)
        self.mean.update(loss)
        self.count += 1
        self.outputs.append(loss)
        self.cache[str(index)] = loss
        self.steps += 1
        self.box.seen.append(index)
        self.log("val_loss", self.mean)
        self.log("steps", float(self.steps))


class Box:
    def __init__(self) -> None:
        self.seen: list[int] = []


class LockedCollects(Collects):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def state_of(net: Any) -> Any:
    return (
        [v.tolist() for v in net.state_dict().values()], float(net.mean.mean_value), len(net.outputs),
        sorted(net.cache), net.steps, net.box.seen[:], float(net.count), sorted(vars(net)),
        [m.training for m in net.modules()],
    )  # fmt: skip


@pytest.mark.parametrize("kind", [Collects, LockedCollects])
def test_nothing_of_a_pass_is_left_and_every_pass_starts_alike(kind: Any, tmp_path: Any) -> None:
    net = kind()
    trainer = fit(net, tmp_path, num_sanity_val_steps=0)
    before = state_of(net)
    with open_road(trainer, net, probe) as road:
        first, second = judge(road), judge(road)
    assert first == second
    assert state_of(net) == before


@pytest.mark.parametrize("kind", [Collects, LockedCollects])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_fit_leaves_what_it_leaves_without_the_callback(
    kind: Any, bits: int, tmp_path: Any
) -> None:
    found = []
    for callbacks in ([], [QuantizeOnFitEnd(bits, dirpath=tmp_path)]):
        torch.manual_seed(0)
        net = kind()
        fit(net, tmp_path, *callbacks)
        found.append(state_of(net)[1:])
    assert found[0] == found[1]


class Talks(Net):
    """Writes to its logger, to a handle that it holds, and to the terminal."""

    def on_fit_start(self) -> None:
        self.handle = self.logger.experiment

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        self.logger.log_metrics({"mine": 1.0})
        self.handle.log_metrics({"held": 1.0})
        print("spoken")
        assert isinstance(self.logger.log_dir, str)


def test_loggers_handles_and_the_terminal_hear_nothing(tmp_path: Any, capsys: Any) -> None:
    heard = []
    for callbacks in ([], [QuantizeOnFitEnd(4, dirpath=tmp_path)]):
        logger = CSVLogger(tmp_path, version=len(callbacks))
        fit(Talks(), tmp_path, *callbacks, logger=logger)
        said = capsys.readouterr().out.count("spoken")
        own = [m for m in logger.experiment.metrics if "mine" in m or "held" in m]
        heard.append((said, len(own)))
    assert heard[0] == heard[1]
    assert heard[0][0] == 6  # two of the sanity check, four of the fit
