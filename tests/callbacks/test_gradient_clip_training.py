"""GradientClipCallback under every way to train: several optimizers, manual steps, accumulation, resuming, logging."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from clipquant import GradientClipCallback
from clipquant.clip import AGC, AdaGC, AutoClip, Indicator, Norm, Value, ZClip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Model(BoringModel):
    def __init__(self, optimizer: str = "SGD", **settings: Any) -> None:
        super().__init__()
        self.optimizer_name, self.settings = optimizer, {"lr": 0.1, **settings}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return (self.layer(batch) ** 2).mean() * (1 + batch_idx % 5)

    def configure_optimizers(self) -> Any:
        return getattr(torch.optim, self.optimizer_name)(self.parameters(), **self.settings)


class Fixed(torch.utils.data.Dataset[Tensor]):
    """Inputs that depend on their index alone."""

    def __init__(self, length: int = 16) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(32, generator=torch.Generator().manual_seed(index))


def train(
    model: pl.LightningModule,
    callbacks: Any,
    steps: int = 4,
    ckpt_path: Any = None,
    **settings: Any,
) -> pl.Trainer:
    arguments = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "max_steps": steps,
        "callbacks": callbacks,
        **settings,
    }
    trainer = pl.Trainer(**arguments)
    trainer.fit(model, torch.utils.data.DataLoader(Fixed()), ckpt_path=ckpt_path)
    return trainer


def twins(make: Any) -> tuple[Any, Any]:
    first, second = make(), make()
    second.load_state_dict(first.state_dict())
    return first, second


def test_manual_optimization_clips_as_automatic_does() -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    automatic, manual = Model(), Manual()
    manual.load_state_dict(automatic.state_dict())
    train(automatic, GradientClipCallback(Norm(0.1)))
    train(manual, GradientClipCallback(Norm(0.1)))
    assert torch.equal(automatic.layer.weight, manual.layer.weight)


class GAN(pl.LightningModule):
    """Two players with an optimizer each, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(32, 32), nn.Linear(32, 1)
        self.seen: dict[str, list[float]] = {"generator": [], "critic": []}

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer, name, sign in zip(
            self.optimizers(), ("generator", "critic"), (-1.0, 10.0), strict=True
        ):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(sign * self.critic(self.generator(batch)).square().mean())
            self.seen[name].append(
                float(torch.stack([p.grad.norm() for p in getattr(self, name).parameters()]).norm())
            )
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(m.parameters(), lr=0.01) for m in (self.generator, self.critic)]


def test_each_optimizer_of_a_gan_has_statistics_of_its_own(tmp_path: Path) -> None:
    model, callback = GAN(), GradientClipCallback(AutoClip(50))
    trainer = train(model, callback, steps=8, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    states = callback.state_dict()["optimizers"]
    for index, name in enumerate(("generator", "critic")):
        assert states[index]["state"]["history"].tolist() == pytest.approx(
            model.seen[name], rel=1e-5
        )
    assert {"grad_norm/optimizer_0", "grad_norm/optimizer_1"} <= set(trainer.callback_metrics)


def test_only_the_optimizers_asked_for_are_clipped() -> None:
    model, callback = GAN(), GradientClipCallback(Norm(1e-3), optimizers=[1])
    train(model, callback, steps=2)
    assert set(callback.state_dict()["optimizers"]) == {1}
    assert float(
        torch.stack([p.grad.norm() for p in model.critic.parameters()]).norm()
    ) == pytest.approx(1e-3, rel=1e-3)
    assert float(torch.stack([p.grad.norm() for p in model.generator.parameters()]).norm()) > 1e-2


def test_two_callbacks_may_clip_two_optimizers_by_two_rules() -> None:
    model = GAN()
    train(
        model,
        [
            GradientClipCallback(Norm(1e-3), optimizers=[0]),
            GradientClipCallback(Norm(2e-3), optimizers=[1]),
        ],
        2,
    )
    assert float(
        torch.stack([p.grad.norm() for p in model.generator.parameters()]).norm()
    ) == pytest.approx(1e-3, rel=1e-3)
    assert float(
        torch.stack([p.grad.norm() for p in model.critic.parameters()]).norm()
    ) == pytest.approx(2e-3, rel=1e-3)


def test_accumulated_gradients_are_clipped_once_as_a_whole() -> None:
    ours, theirs = twins(Model)
    callback = GradientClipCallback(Norm(0.3))
    train(ours, callback, accumulate_grad_batches=4)
    train(theirs, [], accumulate_grad_batches=4, gradient_clip_val=0.3)
    torch.testing.assert_close(ours.layer.weight, theirs.layer.weight)
    assert callback.state_dict()["optimizers"][0]["steps"] == 4


def test_a_training_step_that_returns_none_is_no_step_to_count() -> None:
    class Sometimes(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    callback = GradientClipCallback(AutoClip())
    train(Sometimes(), callback, steps=-1, max_epochs=1)
    saved = callback.state_dict()["optimizers"][0]
    assert saved["steps"] == len(saved["state"]["history"]) == 8


def test_lbfgs_clips_every_evaluation_and_warns() -> None:
    model, callback = Model("LBFGS", lr=0.01, max_iter=3), GradientClipCallback(Norm(1e-2))
    with pytest.warns(UserWarning, match="LBFGS evaluates the gradients several times a step"):
        train(model, callback, steps=2)
    assert callback.state_dict()["optimizers"][0]["steps"] > 2
    assert float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()) <= 1e-2 * (
        1 + 1e-4
    )


def test_lbfgs_refuses_a_rule_with_memory() -> None:
    with pytest.raises(
        MisconfigurationException,
        match=r"AutoClip\(.*keeps statistics from step to step, but LBFGS",
    ):
        train(Model("LBFGS"), GradientClipCallback(AutoClip()))


class Grouped(Model):
    """A parameter group with a rule of its own."""

    override: Any = Norm(1e-3)

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [self.layer.weight]},
            {"params": [self.layer.bias], "clip": self.override},
        ]
        return torch.optim.SGD(groups, lr=0.1)


def test_a_parameter_group_may_bring_its_own_rule() -> None:
    model = Grouped()
    train(model, GradientClipCallback(Norm(1e-2)), steps=2)
    assert float(model.layer.weight.grad.norm()) == pytest.approx(1e-2, rel=1e-3)
    assert float(model.layer.bias.grad.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_a_groups_rule_is_no_part_of_a_checkpoint_and_survives_resuming(tmp_path: Path) -> None:
    model = Grouped()
    trainer = train(model, GradientClipCallback(Norm(1e-2)), steps=2)
    assert trainer.optimizers[0].param_groups[1]["clip"] == Norm(1e-3), "given back after training"
    half = Grouped()
    trainer = train(
        half,
        [GradientClipCallback(Norm(1e-2)), pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)],
        2,
        enable_checkpointing=True,
    )
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "clip" not in saved["optimizer_states"][0]["param_groups"][1]
    resumed = Grouped()
    train(resumed, GradientClipCallback(Norm(1e-2)), steps=4, ckpt_path=tmp_path / "last.ckpt")
    assert float(resumed.layer.bias.grad.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_a_bad_rule_in_a_group_is_refused() -> None:
    class Bad(Grouped):
        override = "norm"

    with pytest.raises(TypeError, match=r"a rule must be a number or an object .* got 'norm'"):
        train(Bad(), GradientClipCallback())


class ByStep(Model):
    """Draws its batch from the step's number, for the loader has no state that a resumed run could take up."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return super().training_step(Fixed()[self.global_step][None], self.global_step)


ADAPTIVE: list[Any] = [
    Norm(0.5, warmup_steps=6),
    AutoClip(30, window=3),
    ZClip(z=0.3, warmup=3),
    AdaGC(ratio=0.9, warmup=3),
]


@pytest.mark.parametrize("stop", [2, 5])
@pytest.mark.parametrize("rule", ADAPTIVE, ids=lambda rule: type(rule).__name__)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    rule: Any, stop: int, tmp_path: Path
) -> None:
    whole, half = twins(lambda: ByStep("AdamW"))
    full, first, second = (GradientClipCallback(rule) for _ in range(3))
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    train(whole, full, steps=10)
    train(half, [first, checkpoint], stop, enable_checkpointing=True)
    resumed = ByStep("AdamW")
    train(resumed, second, steps=10, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(whole.layer.weight, resumed.layer.weight)
    ours, theirs = full.state_dict()["optimizers"][0], second.state_dict()["optimizers"][0]
    assert ours["steps"] == theirs["steps"] == 10
    assert ours["clipped_steps"] == theirs["clipped_steps"]
    assert all(torch.equal(ours["state"][key], theirs["state"][key]) for key in ours["state"])


def test_another_rule_on_resuming_starts_anew_with_a_warning() -> None:
    callback = GradientClipCallback(AutoClip())
    train(Model(), callback)
    other = GradientClipCallback(ZClip())
    with pytest.warns(UserWarning, match=r"written with the rule clipquant\.clip\.AutoClip"):
        other.load_state_dict(callback.state_dict())
    saved = other.state_dict()["optimizers"][0]
    assert saved["steps"] == 4
    assert saved["state"] == {}


def test_a_state_saved_when_rules_stood_in_other_files_is_taken_over() -> None:
    callback, other = GradientClipCallback(AutoClip()), GradientClipCallback(AutoClip())
    train(Model(), callback)
    saved = callback.state_dict()
    assert saved["rule"] == "clipquant.clip.AutoClip"
    other.load_state_dict({**saved, "rule": "clipquant.clip.adaptive.AutoClip"})
    history = other.state_dict()["optimizers"][0]["state"]["history"]
    assert torch.equal(history, saved["optimizers"][0]["state"]["history"])


FIGURES = {"grad_norm", "grad_norm_clipped", "clip_coef", "clip_rate", "skipped_steps"}


def test_figures_are_logged_on_logging_steps_only(tmp_path: Path) -> None:
    callback = GradientClipCallback(Norm(0.1))
    train(Model(), callback, steps=7, logger=CSVLogger(tmp_path), log_every_n_steps=3)
    (file,) = tmp_path.rglob("metrics.csv")
    rows = [row for row in csv.DictReader(file.open()) if row.get("grad_norm")]
    assert [int(row["step"]) for row in rows] == [2, 5]
    assert set(rows[0]) >= FIGURES
    assert float(rows[0]["grad_norm_clipped"]) == pytest.approx(0.1, rel=1e-4)
    assert float(rows[0]["clip_coef"]) == pytest.approx(0.1 / float(rows[0]["grad_norm"]), rel=1e-4)
    assert float(rows[1]["clip_rate"]) == 1.0


def test_clip_rate_and_skipped_steps_count_from_the_start(tmp_path: Path) -> None:
    class Bumpy(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            factor = (0.0, 1e3, float("nan"), 0.0)[batch_idx % 4]
            return super().training_step(batch, batch_idx) * factor

    train(
        Bumpy(),
        GradientClipCallback(Norm(1.0)),
        steps=8,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=8,
    )
    (file,) = tmp_path.rglob("metrics.csv")
    (row,) = [row for row in csv.DictReader(file.open()) if row.get("clip_rate")]
    assert float(row["clip_rate"]) == 0.25
    assert float(row["skipped_steps"]) == 2.0


def read_csv(folder: Path) -> dict[str, float]:
    (file,) = folder.rglob("metrics.csv")
    row = [row for row in csv.DictReader(file.open()) if row["grad_norm"]][-1]
    return {name: float(value) for name, value in row.items() if value}


def read_tensorboard(folder: Path) -> dict[str, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize(
    ("logger", "read"), [(CSVLogger, read_csv), (TensorBoardLogger, read_tensorboard)]
)
@pytest.mark.parametrize(
    ("log", "keys"),
    [("groups", ["group_0", "group_1"]), ("params", ["layer.weight", "layer.bias"])],
)
def test_norms_of_groups_or_parameters_reach_the_logger(
    log: Any, keys: list[str], logger: Any, read: Any, tmp_path: Path
) -> None:
    model = Grouped()
    callback = GradientClipCallback(Norm(1e-2), log=log)
    train(model, callback, logger=logger(tmp_path), log_every_n_steps=2)
    found = read(tmp_path)
    assert set(found) >= FIGURES
    before = [found[f"grad_norm/{key}"] for key in keys]
    after = [found[f"grad_norm_clipped/{key}"] for key in keys]
    assert before == pytest.approx(callback.record.norms.tolist(), rel=1e-5)
    assert after == pytest.approx(
        [float(model.layer.weight.grad.norm()), float(model.layer.bias.grad.norm())], rel=1e-4
    )
    assert found["grad_norm"] == pytest.approx(sum(n * n for n in before) ** 0.5, rel=1e-5)


def test_tensorboard_takes_the_figures_on_logging_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    train(Model(), GradientClipCallback(0.1), logger=logger, log_every_n_steps=2)
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    assert set(events.Tags()["scalars"]) >= FIGURES
    assert [event.step for event in events.Scalars("grad_norm")] == [1, 3]


def test_log_false_logs_nothing_and_fast_dev_run_logs_its_step(tmp_path: Path) -> None:
    trainer = train(
        Model(), GradientClipCallback(log=False), logger=CSVLogger(tmp_path), log_every_n_steps=1
    )
    assert not FIGURES & set(trainer.callback_metrics)
    trainer = train(Model(), GradientClipCallback(), fast_dev_run=True)
    assert set(trainer.callback_metrics) >= FIGURES


@pytest.mark.parametrize(
    "rule", [Value(0.1), Norm(0.1), AGC(), Indicator(), *ADAPTIVE], ids=lambda r: type(r).__name__
)
def test_the_record_has_the_last_steps_figures(rule: Any) -> None:
    model, callback = Model(), GradientClipCallback(rule)
    train(model, callback)
    norm = float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
    assert callback.record.grad_norm_clipped == pytest.approx(norm, rel=1e-4)
    assert callback.record.grad_norm > 0


def test_indicator_logs_the_share_of_elements_that_move() -> None:
    model, callback = Model(), GradientClipCallback(Indicator(0.05), stop_step=3)
    trainer = train(model, callback, steps=3, log_every_n_steps=1)
    ones = sum(float(p.grad.sum()) for p in model.parameters())
    assert 0 < ones < 66
    assert float(trainer.callback_metrics["nonzero_share"]) == pytest.approx(ones / 66)


def test_parameters_added_during_training_are_clipped_too() -> None:
    class Growing(Model):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Parameter(torch.zeros(2))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 100 * (self.late - 1).square().sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.layer.parameters(), lr=0.1)

        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            if batch_idx == 2:
                self.optimizers().optimizer.add_param_group(
                    {"params": [self.late], "clip": Value(0.25)}
                )

    model = Growing()
    train(model, GradientClipCallback(Norm(1.0)), steps=4)
    torch.testing.assert_close(model.late.detach(), torch.full((2,), 2 * 0.1 * 0.25))


def test_a_rule_of_ones_own_by_class_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    (tmp_path / "my_rules.py").write_text(
        "import torch\n"
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Halve:\n"
        "    factor: float = 0.5\n"
        "    def init(self): return {}\n"
        "    def plan(self, grads, params, state): return None, state\n"
        "    def clip(self, grad, param, plan): return grad * self.factor\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--callback", type=pl.Callback)
    config = {
        "class_path": "clipquant.GradientClipCallback",
        "init_args": {"rule": {"class_path": "my_rules.Halve", "init_args": {"factor": 0.25}}},
    }
    callback = parser.instantiate_classes(parser.parse_object({"callback": config})).callback
    model, plain = twins(Model)
    train(model, callback, steps=1)
    train(plain, [], steps=1)
    torch.testing.assert_close(model.layer.weight.grad, plain.layer.weight.grad * 0.25)
