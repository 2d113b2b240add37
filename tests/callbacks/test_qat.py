"""QuantizationAwareTraining in real fits: what was trained is what is written, resumed, stopped, beside others."""

import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import nn

from clipquant import (
    GradientClipCallback,
    QuantizationAwareTraining,
    QuantizeOnFitEnd,
    load_quantized,
)
from clipquant.artifact import read_artifact
from clipquant.quant.training.swap import is_on

sys.path.insert(0, str(Path(__file__).parent))
from small_fit import QUIET, Small, fit, loader


class Normed(Small):
    """A network with batch statistics, a depthwise layer and dropout."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2),
            nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]


def trained(tmp_path, qat, model=None, **arguments):
    torch.manual_seed(0)
    exclude = arguments.pop("exclude", None)
    callback = QuantizeOnFitEnd(dirpath=tmp_path / "quantized", exclude=exclude)
    arguments = {"max_epochs": 3, "num_sanity_val_steps": 0, **arguments}
    callbacks = [qat, *arguments.pop("callbacks", [])]
    trainer, model = fit(callback, tmp_path, model, callbacks, **arguments)
    return trainer, model, callback


WAYS = {
    "1 bit": {"bits": 1},
    "ternary": {"bits": 2, "levels": 2},
    "2 bits": {"bits": 2},
    "groups": {"bits": 4, "granularity": 8},
    "a scale for all": {"bits": 3, "granularity": "tensor"},
    "scales that stay": {"bits": 2, "learn_scale": False},
    "a float network beside": {"bits": 2, "distill": 2.0},
    "others": {"bits": 2, "overrides": {"net.0.*": 5}, "exclude": ["net.4.*"]},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_was_trained_is_what_is_written_to_the_last_digit(way, tmp_path):
    qat = QuantizationAwareTraining(**WAYS[way], start=0.4)
    exclude = WAYS[way].get("exclude")
    trainer, model, callback = trained(tmp_path, qat, Normed(), exclude=exclude)
    report, seen = callback.report, dict(trainer.callback_metrics)
    assert report.failures == ()
    assert report.quantized_metrics == {name: float(value) for name, value in seen.items()}
    assert report.float_metrics == report.quantized_metrics
    assert {layer.method for layer in report.layers} == {"qat"}
    assert "Trained with these codes" in str(report)
    state = load_quantized(callback.artifact_path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert type(model.net[0]) is nn.Conv2d
    bits = {layer.name: layer.bits for layer in report.layers}
    overrides = WAYS[way].get("overrides", {})
    assert bits["net.6.weight"] == WAYS[way]["bits"]
    assert bits["net.0.weight"] == (5 if overrides else WAYS[way]["bits"])
    assert ("net.4.weight" in bits) is ("exclude" not in WAYS[way])
    if way == "ternary":
        values = {len(row.unique()) for row in state["net.6.weight"]}
        assert values <= {1, 2, 3}
    again = pl.Trainer(**QUIET, enable_checkpointing=False).validate(model, loader(), verbose=False)
    assert again[0] == report.quantized_metrics


def test_training_sees_codes_after_its_start_and_floats_before(tmp_path):
    seen = []

    class Watch(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            net = pl_module.net[3]
            seen.append((is_on(pl_module), max(len(r.unique()) for r in net.weight)))

    trained(tmp_path, QuantizationAwareTraining(2, start=0.5), callbacks=[Watch()], max_epochs=2)
    assert [on for on, _ in seen] == [False] * 4 + [True] * 4
    assert all(count > 100 for _, count in seen[:4])
    assert all(count <= 4 for _, count in seen[4:])


def test_grids_and_weights_both_learn(tmp_path):
    before = {}

    class Watch(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            if is_on(pl_module) and not before:
                grids = vars(pl_module.net[3])["_fake_quant_grids"]
                before["grid"] = grids["weight"].now().grid.scale.clone()
                before["weight"] = pl_module.net[3]._parameters["weight"].detach().clone()

    qat = QuantizationAwareTraining(2, start=0.0)
    _, model, _ = trained(tmp_path, qat, callbacks=[Watch()])
    assert not torch.equal(qat.trained["net.3.weight"].grid.scale, before["grid"])
    scale = qat.trained["net.3.weight"].grid.scale.float()
    moved = (model.net[3].weight - before["weight"]).abs()
    assert float((moved / scale).detach().max()) > 0.5  # by more than rounding alone would


def test_checkpoints_have_the_keys_and_optimizers_of_a_training_without(tmp_path):
    found = []
    for callbacks in ([], [QuantizationAwareTraining(2, start=0.0)]):
        torch.manual_seed(0)
        trainer, _ = fit(ModelCheckpoint(tmp_path / str(len(found))), tmp_path, Normed(), callbacks,
                         enable_checkpointing=True)  # fmt: skip
        path = trainer.checkpoint_callback.best_model_path
        found.append((path, torch.load(path, weights_only=True)))
    plain, quantized = found[0][1], found[1][1]
    assert plain["state_dict"].keys() == quantized["state_dict"].keys()
    groups = [c["optimizer_states"][0]["param_groups"] for c in (plain, quantized)]
    assert groups[0] == groups[1]
    model = Normed.load_from_checkpoint(found[1][0])  # without the callback
    latent = model.state_dict()["net.6.weight"]
    assert max(len(row.unique()) for row in latent) > 4
    assert not is_on(model)


class Stop(Callback):
    """Saves a checkpoint in the middle of an epoch."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("epoch", [0, 1])  # before and after the start
@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_a_resumed_fit_is_the_same_to_the_last_bit(epoch, distill, tmp_path):
    keeper = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)

    def fitted(*callbacks, ckpt_path=None):
        torch.manual_seed(0)
        qat = QuantizationAwareTraining(2, start=0.4, distill=distill)
        model = Normed()
        model.net[3] = nn.Identity()  # dropout draws anew where a fit goes on
        trainer = pl.Trainer(
            callbacks=[qat, *callbacks], max_epochs=3, default_root_dir=tmp_path,
            enable_checkpointing=bool(callbacks), **QUIET,
        )  # fmt: skip
        trainer.fit(model, loader(), loader(), ckpt_path=ckpt_path)
        return qat, model

    whole, model = fitted(keeper)
    again, resumed = fitted(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert len(whole.trained) == len(again.trained) == 3
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in resumed.state_dict().items())
    for name, grid in whole.trained.items():
        assert torch.equal(again.trained[name].grid.scale, grid.grid.scale)
        assert torch.equal(again.trained[name].grid.zero, grid.grid.zero)


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    """The checkpoint of a fit that was training quantized."""
    folder = tmp_path_factory.mktemp("middle")
    trained(folder, QuantizationAwareTraining(2, start=0.2), callbacks=[Stop(folder / "a.ckpt", 7)])
    return folder / "a.ckpt"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 3}, "bits=2 there, and has bits=3 now"),
        ({"bits": 2, "levels": 2}, "levels=None there, and has levels=2 now"),
        ({"bits": 2, "exclude": ["net.0.*"]}, "net.0.weight differ"),
    ],
)
def test_a_fit_that_goes_on_with_other_grids_is_refused(settings, said, middle, tmp_path):
    qat = QuantizationAwareTraining(**settings, start=0.2)
    trainer = pl.Trainer(callbacks=[qat], max_epochs=3, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ValueError, match=said):
        trainer.fit(Small(), loader(), loader(), ckpt_path=middle)


def test_a_checkpoint_is_evaluated_as_it_was_trained(middle, tmp_path):
    model = Small()
    trainer = pl.Trainer(
        callbacks=[QuantizationAwareTraining(2)], default_root_dir=tmp_path, **QUIET
    )
    (seen,) = trainer.validate(model, loader(), ckpt_path=middle, verbose=False)
    plain = pl.Trainer(**QUIET, enable_checkpointing=False)
    (latent,) = plain.validate(Small(), loader(), ckpt_path=middle, verbose=False)
    assert seen != latent
    assert not is_on(model)


def test_the_best_checkpoint_is_written_on_its_own_grids(tmp_path):
    torch.manual_seed(0)
    keeper = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")  # the first is best
    callback = QuantizeOnFitEnd(weights="best", dirpath=tmp_path / "quantized", monitor="val_loss")
    qat = QuantizationAwareTraining(2, start=0.0)
    fit(callback, tmp_path, Small(), [qat, keeper], max_epochs=3, enable_checkpointing=True)
    best = pl.Trainer(callbacks=[QuantizationAwareTraining(2)], **QUIET, enable_checkpointing=False)
    (expected,) = best.validate(Small(), loader(), ckpt_path=keeper.best_model_path, verbose=False)
    assert callback.report.failures == ()
    assert callback.report.quantized_metrics == expected
    held = read_artifact(callback.artifact_path).weights.tensors["net.3.weight"].scale
    assert not torch.equal(held, qat.trained["net.3.weight"].grid.scale)


def test_a_best_checkpoint_of_before_the_start_is_told(tmp_path):
    keeper = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")
    callback = QuantizeOnFitEnd(weights="best", dirpath=tmp_path / "quantized", monitor="val_loss")
    qat = QuantizationAwareTraining(2, start=0.9)
    fit(callback, tmp_path, Small(), [qat, keeper], max_epochs=3, enable_checkpointing=True)
    assert "before the training was quantized" in str(callback.report.failures)


def test_a_fit_that_ends_before_its_start_is_quantized_as_without_and_told_once(tmp_path):
    qat = QuantizationAwareTraining(2, start=0.9)
    stop = EarlyStopping("val_loss", patience=0, stopping_threshold=99.0)
    with pytest.warns(UserWarning, match="never began") as told:
        _, model, callback = trained(tmp_path, qat, callbacks=[stop], max_epochs=9)
    assert sum("never began" in str(warning.message) for warning in told) == 1
    assert {layer.method for layer in callback.report.layers} == {"rtn"}
    assert {layer.bits for layer in callback.report.layers} == {8}


def test_a_fit_that_fails_leaves_layers_of_their_own_class(tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                raise RuntimeError("no power")

    model = Small()
    with pytest.raises(RuntimeError, match="no power"):
        trained(tmp_path, QuantizationAwareTraining(2, start=0.0), model, callbacks=[Fails()])
    assert type(model.net[0]) is nn.Conv2d
    assert max(len(row.unique()) for row in model.net[3].weight) > 4


def test_a_second_fit_starts_anew(tmp_path):
    qat = QuantizationAwareTraining(2, start=0.5)
    for _ in range(2):
        _, _, callback = trained(tmp_path, qat)
        assert {layer.method for layer in callback.report.layers} == {"qat"}


BESIDE = {
    "clipping": lambda: {"callbacks": [GradientClipCallback(0.01)]},
    "swa": lambda: {"callbacks": [StochasticWeightAveraging(0.01, swa_epoch_start=1)]},
    "ema": lambda: {"callbacks": [EMAWeightAveraging(decay=0.5)]},
    "bf16": lambda: {"precision": "bf16-mixed"},
    "bf16-true": lambda: {"precision": "bf16-true"},
    "accumulation": lambda: {"accumulate_grad_batches": 2},
    "steps": lambda: {"max_steps": 6, "max_epochs": -1},
    "a dry run": lambda: {"fast_dev_run": True},
}


@pytest.mark.parametrize("beside", BESIDE)
def test_beside_others_the_file_holds_what_the_module_holds(beside, tmp_path):
    qat = QuantizationAwareTraining(2, start=0.3)
    _, model, callback = trained(tmp_path, qat, **BESIDE[beside]())
    assert {layer.method for layer in callback.report.layers} == {"qat"}
    assert callback.report.float_metrics == callback.report.quantized_metrics
    state = load_quantized(callback.artifact_path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_averaged_weights_are_put_on_the_grid(tmp_path):
    """The last validation sees the average; so does the file."""
    qat = QuantizationAwareTraining(2, start=0.3)
    trainer, _, callback = trained(tmp_path, qat, callbacks=[EMAWeightAveraging(decay=0.5)])
    seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert callback.report.quantized_metrics == seen


def test_a_compiled_module_computes_with_codes(tmp_path):
    torch.manual_seed(0)
    model = Small()
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            seen.append(float(outputs["loss"]))

    def losses(module):
        seen.clear()
        torch.manual_seed(0)
        trainer = pl.Trainer(
            callbacks=[QuantizationAwareTraining(1, start=0.5), Watch()], max_epochs=2,
            enable_checkpointing=False, default_root_dir=tmp_path, **QUIET,
        )  # fmt: skip
        trainer.fit(module, loader(), loader())
        return list(seen)

    start = {name: value.clone() for name, value in model.state_dict().items()}
    plain = losses(model)
    model.load_state_dict(start)
    compiled = losses(torch.compile(model, backend="aot_eager"))
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


class Lazy(Small):
    """Layers whose shapes the first batch tells."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))


class Frozen(Small):
    """A layer that is not trained."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)


class Closures(Small):
    """An optimizer that runs the step several times."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=2)


class Rebuilt(Small):
    """A weight that is rebuilt before each forward, which stays as it is."""

    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.net[0])


class Own(Small):
    """A weight that no layer holds, named by include."""

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(0.1 * torch.randn(10, 10))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]) @ self.own, batch[1])


@pytest.mark.parametrize("kind", [Lazy, Frozen, Closures, Rebuilt, Own])
def test_other_kinds_of_modules_are_trained_too(kind, tmp_path):
    include = ["own"] if kind is Own else None
    qat = QuantizationAwareTraining(2, start=0.3, include=include)
    torch.manual_seed(0)
    quantizer = QuantizeOnFitEnd(dirpath=tmp_path / "quantized", include=include)
    _, model = fit(quantizer, tmp_path, kind(), [qat], max_epochs=3)
    names = {Rebuilt: {"net.3.weight"}, Own: {"own"}}.get(kind, {"net.0.weight", "net.3.weight"})
    assert quantizer.report.failures == ()
    assert set(qat.trained) == {layer.name for layer in quantizer.report.layers} == names
    state = load_quantized(quantizer.artifact_path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not is_on(model)


class TwoOptimizers(Small):
    """Steps two optimizers by hand, the second frozen out of the first one's turn."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, i):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, i))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), 0.1) for i in (0, 3)]


def test_several_optimizers_move_each_its_own_grids(tmp_path):
    qat = QuantizationAwareTraining(2, start=0.0)
    _, _, callback = trained(tmp_path, qat, TwoOptimizers())
    assert callback.report.float_metrics == callback.report.quantized_metrics
    assert callback.report.failures == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"start": 1.5}, "start is a share of the fit"),
        ({"start": -0.1}, "start is a share of the fit"),
        ({"start": "half"}, "start is a share of the fit"),
        ({"bits": 0}, "bits must be a whole number from 1 to 8"),
        ({"distill": -1}, "distill is a factor"),
        ({"distill": float("nan")}, "distill is a factor"),
        ({"bits": 1, "symmetric": True}, "symmetric grid needs 2 steps"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        QuantizationAwareTraining(**arguments)


class Bare(Small):
    """A module that holds nothing to quantize."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Unflatten(1, (64,)))


@pytest.mark.parametrize(
    ("callbacks", "arguments", "said"),
    [
        ([QuantizationAwareTraining(2), QuantizeOnFitEnd(4)], {}, r"QuantizeOnFitEnd\(bits=4\)"),
        (
            [QuantizationAwareTraining(2), QuantizeOnFitEnd("auto", max_size=0.5)],
            {},
            "bits='auto' chooses other grids",
        ),
        ([QuantizationAwareTraining(2), ModelPruning("l1_unstructured", amount=0.5)], {}, "ModelPruning"),
        ([QuantizationAwareTraining(2)], {"max_epochs": -1}, "whose length must be known"),
        ([QuantizationAwareTraining(2, exclude=["nowhere"])], {}, "matches no parameter"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_training(callbacks, arguments, said, tmp_path):
    arguments = {"max_epochs": 1, "default_root_dir": tmp_path, **QUIET, **arguments}
    trainer = pl.Trainer(callbacks=callbacks, **arguments)
    with pytest.raises(ValueError, match=said):
        trainer.fit(Small(), loader(), loader())
    assert trainer.global_step == 0


def test_a_model_without_a_layer_to_quantize_is_refused(tmp_path):
    trainer = pl.Trainer(
        callbacks=[QuantizationAwareTraining(2)], default_root_dir=tmp_path, max_epochs=1, **QUIET
    )
    with pytest.raises(ValueError, match="no weight to quantize"):
        trainer.fit(Bare(), loader(), loader())


def test_no_warning_in_a_plain_fit(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module="clipquant")
        trained(tmp_path, QuantizationAwareTraining(4, start=0.5))


@pytest.mark.parametrize("budget", [{"max_size": 2300}, {"max_drop": 0.5, "max_size": "3kB"}])
def test_bits_that_budgets_choose_are_trained_for_the_rest_of_the_fit(budget, tmp_path):
    torch.manual_seed(0)
    quantizer = QuantizeOnFitEnd(
        "auto", dirpath=tmp_path / "quantized", monitor="val_loss", **budget
    )
    qat = QuantizationAwareTraining("auto", start=0.4)
    trainer, model = fit(quantizer, tmp_path, Small(), [qat], max_epochs=4)
    report = quantizer.report
    assert report.failures == ()
    assert report.budget.met
    assert report.size_bytes <= report.budget.max_size
    assert [trial.what for trial in report.budget.trials] == ["trained"]
    assert {layer.method for layer in report.layers} == {"qat"}
    widths = {width for layer in report.layers for width in layer.rows}
    assert len(widths) > 1  # of each row its own
    seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert report.quantized_metrics == seen
    state = load_quantized(quantizer.artifact_path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_bits_without_a_budget_are_refused(tmp_path):
    with pytest.raises(ValueError, match="trains the bits that budgets choose, and there are none"):
        trained(tmp_path, QuantizationAwareTraining("auto"))


def test_a_budget_that_training_missed_is_told(tmp_path):
    class Broken(Small):
        def validation_step(self, batch, i):
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("val_loss", loss + 9.0 * is_on(self) + 9.0 * (self.trainer.global_step > 14))

    quantizer = QuantizeOnFitEnd(
        "auto", dirpath=tmp_path / "quantized", monitor="val_loss", max_drop=0.5
    )
    qat = QuantizationAwareTraining("auto", start=0.4)
    with pytest.warns(UserWarning, match="worse than that of the float network when its bits"):
        fit(quantizer, tmp_path, Broken(), [qat], max_epochs=4)
    assert not quantizer.report.budget.met


def test_another_librarys_keyword_is_told_by_its_name_here():
    with pytest.raises(TypeError, match=r"nbits=2: give bits=2"):
        QuantizationAwareTraining(nbits=2)


class Called(Small):
    """Calls itself in validation, in whose place an exported file can run."""

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, i):
        out = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(out, batch[1]))
        self.log("val_acc", (out.argmax(1) == batch[1]).float().mean())


def test_ranges_of_inputs_are_trained_and_an_int8_export_takes_them(tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    quantizer = QuantizeOnFitEnd(
        dirpath=tmp_path / "quantized", export=["onnx-int8"], monitor="val_acc", mode="max"
    )
    qat = QuantizationAwareTraining(8, start=0.2, activations=8)
    trainer, _ = fit(quantizer, tmp_path, Called(), [qat], max_epochs=10)
    (export,) = quantizer.report.exports
    assert export["error"] is None
    assert "activation ranges by training" in export["notes"]
    seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert export["metrics"]["val_acc"] == pytest.approx(seen["val_acc"], abs=1 / 64 + 1e-6)
    assert export["metrics"]["val_loss"] == pytest.approx(seen["val_loss"], rel=0.02)
    ends = {name: grid.inputs for name, grid in qat.trained.items()}
    assert ends["net.0.weight"][0] < -2 < 2 < ends["net.0.weight"][1]
    assert ends["net.3.weight"][0] == 0.0  # behind a ReLU
    # What training saw is not what float inputs give.
    assert quantizer.report.quantized_metrics["val_loss"] != seen["val_loss"]


def test_a_resumed_fit_goes_on_with_the_ranges_of_its_inputs(tmp_path):
    keeper = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)

    def fitted(*callbacks, ckpt_path=None):
        torch.manual_seed(0)
        qat = QuantizationAwareTraining(4, start=0.2, activations=8)
        trainer = pl.Trainer(
            callbacks=[qat, *callbacks], max_epochs=10, default_root_dir=tmp_path,
            enable_checkpointing=bool(callbacks), **QUIET,
        )  # fmt: skip
        model = Small()
        trainer.fit(model, loader(), loader(), ckpt_path=ckpt_path)
        return qat.trained, model

    trained, model = fitted(keeper)
    for epoch in (3, 7):  # while ranges are seen, and while they are learned
        again, resumed = fitted(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert {n: g.inputs for n, g in again.items()} == {n: g.inputs for n, g in trained.items()}
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in resumed.state_dict().items())


def test_activations_of_another_width_are_refused():
    with pytest.raises(ValueError, match="activations must be one of 8, None; got 4"):
        QuantizationAwareTraining(4, activations=4)


def test_grids_that_cannot_be_put_on_lose_no_fit(tmp_path, monkeypatch):
    def broken(self, module):
        raise RuntimeError("no room")

    monkeypatch.setattr("clipquant.quant.training.running.Running.finish_", broken)
    quantizer = QuantizeOnFitEnd(4, dirpath=tmp_path / "out")
    training = QuantizationAwareTraining(4, start=0)
    with pytest.warns(UserWarning, match="could not put .* on their grids .*no room") as told:
        _, model = fit(training, tmp_path, callbacks=[quantizer])
    assert not any("never began" in str(w.message) for w in told)
    assert type(model.net[0]) is nn.Conv2d
    assert training.trained == {}
    held = load_quantized(quantizer.artifact_path, Small()).state_dict()
    assert all(torch.equal(v, held[k]) for k, v in model.state_dict().items())
