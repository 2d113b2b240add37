"""Whatever the optimizer holds at a step is clipped at that step, and what the log says is what happened."""

from __future__ import annotations

import functools
import pickle
import types
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn

from clipquant import GradientClipCallback
from clipquant.clip import AGC, AutoClip, Norm, Value, ZClip
from clipquant.errors import ArgumentError, ClipquantError

LIMIT = 0.01
both = pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])


def net(package: Any = pl) -> Any:
    """Return a class of modules that keep the norm of all gradients after each step."""

    class Net(package.LightningModule):
        def __init__(self, make: Any = None, scale: float = 1.0) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 1)
            self.make, self.scale, self.norms, self.lr = make, scale, [], 0.1

        def training_step(self, batch: Tensor, i: int) -> Tensor | None:
            return self.scale * (self.b(torch.tanh(self.a(batch))) - 1).square().mean()

        def configure_optimizers(self) -> Any:
            return self.make(self) if self.make else torch.optim.SGD(self.parameters(), lr=0.1)

        def optimizer_step(self, epoch: int, i: int, optimizer: Any, closure: Any = None) -> None:
            super().optimizer_step(epoch, i, optimizer, closure)
            self.norms.append(total(self.parameters()))

    return Net


Net = net()


def total(params: Any) -> float:
    grads = [p.grad.double().norm() for p in params if p.grad is not None]
    return float(torch.stack(grads).norm()) if grads else 0.0


def batches(count: int = 6) -> Any:
    generator = torch.Generator().manual_seed(1)
    return torch.utils.data.DataLoader(
        [torch.randn(4, generator=generator) for _ in range(2 * count)], batch_size=2
    )


class Rows(Logger):
    name, version = "rows", "0"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def trainer(*callbacks: Any, package: Any = pl, **settings: Any) -> Any:
    arguments = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return package.Trainer(callbacks=list(callbacks), **{**arguments, **settings})


class At(pl.Callback):
    """Does something to the module and its Trainer at the start of one batch."""

    def __init__(self, batch: int, do: Any) -> None:
        self.batch, self.do = batch, do

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, i: int) -> None:
        if i == self.batch:
            self.do(trainer, module)


def exchange_optimizer(trainer: Any, module: Any) -> None:
    trainer.strategy.optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)]


def replace_parameter(trainer: Any, module: Any) -> None:
    module.a.weight = nn.Parameter(torch.randn(3, 4))
    trainer.optimizers[0].param_groups[0]["params"][0] = module.a.weight


def unfreeze(trainer: Any, module: Any) -> None:
    module.c = nn.Parameter(torch.ones(3))
    trainer.optimizers[0].add_param_group({"params": [module.c]})
    module.b.weight.requires_grad_(True)


@pytest.mark.parametrize("do", [exchange_optimizer, replace_parameter, unfreeze])
def test_what_the_optimizer_holds_now_is_clipped_now(do: Any) -> None:
    module, rows = Net(), Rows()
    module.b.weight.requires_grad_(do is not unfreeze)
    trainer(GradientClipCallback(Norm(LIMIT)), At(2, do), logger=rows).fit(module, batches())
    assert max(module.norms) <= LIMIT * 1.001
    assert rows.rows[-1]["grad_norm_clipped"] == pytest.approx(module.norms[-1], rel=1e-4)


def wrap(optimizer: Any, how: str) -> None:
    step = optimizer.step
    if how == "wraps":

        @functools.wraps(step)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return step(*args, **kwargs)

        optimizer.step = wrapped
    elif how == "method":
        optimizer.step = types.MethodType(lambda self, closure=None: step(closure), optimizer)
    else:
        optimizer.register_step_pre_hook(lambda *_: None)


@pytest.mark.parametrize("how", ["wraps", "method", "hook"])
def test_a_step_that_is_not_torchs_own_gets_gradients_that_are_clipped_already(how: str) -> None:
    def make(module: Any) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
        wrap(optimizer, how)
        return optimizer

    module, callback = Net(make), GradientClipCallback(Norm(LIMIT))
    trainer(callback).fit(module, batches())
    assert callback.record.deferred is None
    assert max(module.norms) <= LIMIT * 1.001


def test_a_step_that_a_scheduler_counts_still_folds() -> None:
    def make(module: Any) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    module, callback = Net(make), GradientClipCallback(Norm(LIMIT))
    trainer(callback).fit(module, batches())
    assert callback.record.deferred is not None
    assert max(module.norms) <= LIMIT * 1.001


@pytest.mark.parametrize("rule", [AutoClip(10), ZClip(warmup=2), Norm(1.0, warmup_steps=4)])
def test_a_callback_used_again_begins_anew_and_the_same_fit_goes_on(rule: Any) -> None:
    def clipped(callback: Any, scale: float) -> list[float]:
        rows = Rows()
        trainer(callback, logger=rows).fit(Net(scale=scale), batches())
        return [row["grad_norm_clipped"] for row in rows.rows]

    used = GradientClipCallback(rule)
    clipped(used, 1e-4)
    assert clipped(used, 1.0) == clipped(GradientClipCallback(rule), 1.0)
    module, callback = Net(), GradientClipCallback(rule)
    again = trainer(callback)
    again.fit(module, batches())
    again.fit_loop.max_epochs = 2
    again.fit(module, batches())
    assert callback.state_dict()["optimizers"][0]["steps"] == 12
    record = pickle.loads(pickle.dumps(callback.record))
    assert record.grad_norm == callback.record.grad_norm


def grouped(rule: Any) -> Any:
    return lambda m: torch.optim.SGD(
        [{"params": m.a.parameters(), "clip": rule, "name": "body"}, {"params": m.b.parameters()}],
        lr=0.1,
    )


def test_after_an_exception_the_groups_still_have_their_rules() -> None:
    class Failing(Net):
        fails = True

        def configure_optimizers(self) -> Any:
            self.optimizer = getattr(self, "optimizer", None) or grouped(Norm(LIMIT))(self)
            return self.optimizer

        def training_step(self, batch: Tensor, i: int) -> Any:
            if self.fails and i == 2:
                raise RuntimeError("out of memory")
            return super().training_step(batch, i)

        def on_train_batch_end(self, *args: Any) -> None:
            self.seen = total(self.a.parameters())

    module = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(GradientClipCallback(1e6)).fit(module, batches())
    module.fails = False
    trainer(GradientClipCallback(1e6)).fit(module, batches())
    assert module.seen <= LIMIT * 1.001
    assert module.optimizer.param_groups[0]["clip"] == Norm(LIMIT)
    assert not module.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("rule", [LIMIT, Norm(LIMIT), AutoClip(50)], ids=repr)
def test_no_saved_state_holds_a_rule_and_all_resume(rule: Any, tmp_path: Any) -> None:
    first = trainer(GradientClipCallback(1.0))
    module = Net(grouped(rule))
    first.fit(module, batches())
    first.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert all("clip" not in group for group in saved["optimizer_states"][0]["param_groups"])
    assert "clip" not in module.trainer.optimizers[0].state_dict()["param_groups"][0]
    second = trainer(GradientClipCallback(1.0), max_epochs=2)
    second.fit(Net(grouped(rule)), batches(), ckpt_path=tmp_path / "a.ckpt")
    assert second.optimizers[0].param_groups[0]["clip"] == rule


def test_a_resumed_run_whose_group_has_another_rule_says_so(tmp_path: Any) -> None:
    first = trainer(GradientClipCallback(1.0))
    first.fit(Net(grouped(AutoClip(50))), batches())
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = trainer(GradientClipCallback(1.0), max_epochs=2)
    with pytest.warns(
        UserWarning, match="parameter group 0 was written by another rule than ZClip"
    ):
        second.fit(Net(grouped(ZClip())), batches(), ckpt_path=tmp_path / "a.ckpt")


def test_a_resumed_run_with_other_numbers_in_its_rule_goes_on(tmp_path: Any) -> None:
    first = trainer(GradientClipCallback(AutoClip(10)))
    first.fit(Net(), batches())
    first.save_checkpoint(tmp_path / "a.ckpt")
    callback = GradientClipCallback(AutoClip(50))
    trainer(callback, max_epochs=2).fit(Net(), batches(), ckpt_path=tmp_path / "a.ckpt")
    state = callback.state_dict()["optimizers"][0]
    assert state["steps"] == len(state["state"]["history"]) == 12


@pytest.mark.parametrize("finder", ["lr_find", "scale_batch_size"])
def test_the_finders_run_with_rules_in_groups_and_it_is_said_that_they_do_not_clip(
    finder: str, tmp_path: Any
) -> None:
    module = Net(lambda m: grouped(Norm(LIMIT))(m))
    module.batch_size = 2
    module.train_dataloader = batches
    tuner = Tuner(trainer(GradientClipCallback(1.0), default_root_dir=tmp_path))
    run = {
        "lr_find": lambda: tuner.lr_find(module, num_training=4),
        "scale_batch_size": lambda: tuner.scale_batch_size(module, max_trials=1),
    }[finder]
    with pytest.warns(UserWarning, match="GradientClipCallback does not clip what .*Finder tries"):
        run()


def test_frozen_main_groups_do_not_take_a_groups_state() -> None:
    class Unfreeze(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            module.b.requires_grad_(trainer.current_epoch > 0)

    callback = GradientClipCallback(AutoClip(10))
    trainer(Unfreeze(), callback, max_epochs=2).fit(Net(grouped(AutoClip(50))), batches())
    state = callback.state_dict()["optimizers"][0]["state"]
    assert (len(state["history"]), len(state["group0.history"])) == (6, 12)


def test_steps_that_were_never_seen_are_told_once() -> None:
    class Bare(Net):
        automatic_optimization = False

        def training_step(self, batch: Tensor, i: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, i))
            optimizer.step()

    with pytest.warns(UserWarning, match="saw no step of optimizer 0") as seen:
        trainer(GradientClipCallback(Norm(LIMIT))).fit(Bare(), batches())
    assert sum("saw no step" in str(w.message) for w in seen) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*saw no step.*")
        trainer(GradientClipCallback(Norm(LIMIT))).fit(Net(), batches())


def test_two_callbacks_clip_in_turn_and_log_under_keys_of_their_own() -> None:
    module, rows = Net(), Rows()
    callbacks = [GradientClipCallback(AGC(0.05)), GradientClipCallback(Norm(LIMIT))]
    trainer(*callbacks, logger=rows).fit(module, batches())
    for row in rows.rows:
        assert row["grad_norm_clipped/AGC"] == pytest.approx(row["grad_norm/Norm"], rel=1e-5)
        assert row["grad_norm/AGC"] > row["grad_norm_clipped/AGC"]
        assert "grad_norm" not in row
    assert max(module.norms) <= LIMIT * 1.001


def test_groups_are_logged_by_their_names() -> None:
    rows = Rows()
    trainer(GradientClipCallback(Norm(LIMIT), log="groups"), logger=rows).fit(
        Net(grouped(Norm(LIMIT))), batches()
    )
    assert {"grad_norm/body", "grad_norm/group_1"} <= rows.rows[0].keys()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rule", [Norm(0.0), Norm(1e-38), AutoClip(10)], ids=repr)
def test_coefficients_of_zero_under_fused_optimizers_as_without(rule: Any, fused: bool) -> None:
    class Masked(Net):
        def training_step(self, batch: Tensor, i: int) -> Any:
            return super().training_step(batch, i) * (i >= 3)

    module = Masked(lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, fused=fused))
    trainer(GradientClipCallback(rule)).fit(module, batches())
    assert all(p.isfinite().all() for p in module.parameters())
    if isinstance(rule, Norm):
        assert max(module.norms) <= 1e-30
    else:
        assert module.norms[-1] > 0, "zeros in the beginning are no reason to stop learning"


def amp(scale: float = 1024.0) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_scaler_that_overflows_for_ever_is_counted_and_stopped(policy: Any, fused: bool) -> None:
    rows = Rows()
    module = Net(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, fused=fused), scale=float("nan"))
    callback = GradientClipCallback(Norm(1.0), on_nonfinite=policy, max_consecutive_skips=3)
    with pytest.raises(RuntimeError, match="4 steps in a row were skipped"):
        trainer(callback, logger=rows, plugins=[amp()]).fit(module, batches(8))
    assert [row["skipped_steps"] for row in rows.rows] == [1, 2, 3]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rule", [Norm(LIMIT), Value(LIMIT), AGC(0.01)], ids=repr)
def test_none_inside_an_accumulation_window_leaves_norms_right(rule: Any, fused: bool) -> None:
    class Sometimes(Net):
        def training_step(self, batch: Tensor, i: int) -> Any:
            return None if i % 4 == 1 else super().training_step(batch, i)

    def run(**settings: Any) -> tuple[list[float], Any]:
        module, rows = (
            Sometimes(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, fused=fused)),
            Rows(),
        )
        callback = GradientClipCallback(rule)
        trainer(callback, logger=rows, accumulate_grad_batches=2, **settings).fit(
            module, batches(8)
        )
        return [r["grad_norm"] for r in rows.rows], module

    class InFloat32(MixedPrecision):
        def autocast_context_manager(self) -> Any:
            return torch.autocast("cpu", enabled=False)

    scaled = InFloat32("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    norms, module = run(plugins=[scaled])
    assert max(norms) < 20, "norms are those of the gradients without the loss scale"
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("when", [1, 2, 3])
def test_a_skipped_step_of_lbfgs_leaves_parameters_and_state_bit_for_bit(
    when: int, search: Any
) -> None:
    class Damaged(Net):
        calls = 0

        def on_train_batch_start(self, batch: Any, i: int) -> None:
            self.calls, self.before = 0, self.frozen()

        def frozen(self) -> list[Tensor]:
            state = self.optimizers().optimizer.state
            values = [v for entry in state.values() for v in entry.values()]
            tensors = [t for v in values for t in (v if isinstance(v, list) else [v])]
            kept = [t for t in tensors if isinstance(t, Tensor)]
            return [t.detach().clone() for t in (*self.parameters(), *kept)]

        def on_train_batch_end(self, out: Any, batch: Any, i: int) -> None:
            after = self.frozen()
            same = len(after) == len(self.before)
            self.same = getattr(self, "same", [])
            self.same.append(
                same and all(torch.equal(a, b) for a, b in zip(self.before, after, strict=True))
            )

        def training_step(self, batch: Tensor, i: int) -> Any:
            self.calls += 1
            loss = super().training_step(batch, i)
            return loss * float("nan") if i == 2 and self.calls >= when else loss

    make = functools.partial(torch.optim.LBFGS, lr=0.5, max_iter=6, line_search_fn=search)
    module = Damaged(lambda m: make(m.parameters()))
    trainer(GradientClipCallback(Norm(1.0), max_consecutive_skips=None)).fit(module, batches())
    assert module.same[:4] == [False, False, True, False]


@both
@pytest.mark.parametrize("fused", [False, True])
def test_trainers_of_both_packages_clip(package: str, fused: bool) -> None:
    library = pytest.importorskip(package)
    rows: list[dict[str, float]] = []

    class Keeping(library.loggers.logger.DummyLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            rows.append(dict(metrics))

    module = net(library)(lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, fused=fused))
    callback = GradientClipCallback(Norm(LIMIT))
    trainer(callback, package=library, logger=Keeping()).fit(module, batches())
    assert max(module.norms) <= LIMIT * 1.001
    assert rows[-1]["grad_norm_clipped"] == pytest.approx(LIMIT, rel=1e-3)
    assert (callback.record.deferred is not None) is fused


def test_the_other_packages_command_line_takes_the_callback(tmp_path: Any) -> None:
    library = pytest.importorskip("pytorch_lightning")
    pytest.importorskip("jsonargparse")
    from pytorch_lightning.cli import LightningCLI
    from pytorch_lightning.demos.boring_classes import BoringDataModule, BoringModel

    (tmp_path / "c.yaml").write_text(
        "trainer:\n  max_steps: 1\n  accelerator: cpu\n  logger: false\n  callbacks:\n"
        "    - class_path: clipquant.GradientClipCallback\n      init_args:\n        rule:\n"
        "          class_path: clipquant.clip.Chain\n          init_args:\n            rules:\n"
        "              - class_path: clipquant.clip.AGC\n"
        "              - class_path: clipquant.clip.Norm\n"
        "                init_args: {max_norm: 0.5}\n"
    )
    args = ["--config", str(tmp_path / "c.yaml")]
    line = LightningCLI(BoringModel, BoringDataModule, run=False, args=args)
    (callback,) = [c for c in line.trainer.callbacks if isinstance(c, GradientClipCallback)]
    assert isinstance(callback, library.Callback)
    assert callback.rule.rules == (AGC(), Norm(0.5))


def test_zero_for_a_parameter_group_is_refused_with_both_readings() -> None:
    module = Net(grouped(0))
    with pytest.raises(ArgumentError, match=r'parameter group \d, key "clip".*None.*Value\(0.0\)'):
        trainer(GradientClipCallback(Norm(1.0))).fit(module, batches())


def test_two_callbacks_alike_in_one_trainer_are_refused_by_name() -> None:
    alike = [GradientClipCallback(Norm(1.0), exclude=["b.bias"]) for _ in range(2)]
    with pytest.raises(
        ClipquantError, match=r"two GradientClipCallbacks .*Norm.*'b.bias'.*remove one"
    ):
        trainer(*alike).fit(Net(), batches())
    # Each alone, and both for parameters of their own, are in order.
    trainer(alike[0]).fit(Net(), batches())
    apart = [GradientClipCallback(Norm(1.0), **{how: ["b.*"]}) for how in ("include", "exclude")]
    trainer(*apart).fit(Net(), batches())


def test_the_key_in_a_checkpoint_is_the_settings_own() -> None:
    first, second = GradientClipCallback(Norm(1.0)), GradientClipCallback(Norm(1.0))
    for callback in (first, second):
        trainer(callback).fit(Net(), batches())
    assert first.state_key == second.state_key


def test_resuming_with_another_rule_is_said_once(tmp_path: Path) -> None:
    run = trainer(GradientClipCallback(ZClip(warmup=2)))
    run.fit(Net(), batches())
    run.save_checkpoint(tmp_path / "a.ckpt")
    callback = GradientClipCallback(Norm(1.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, max_epochs=2).fit(Net(), batches(), ckpt_path=tmp_path / "a.ckpt")
    said = [str(w.message) for w in caught if "ZClip" in str(w.message)]
    assert len([s for s in said if "counts go on, the state of the rule starts anew" in s]) == 1
    assert callback._progress[0].steps == 2 * run.global_step
