"""QuantizeOnFitEnd in real fits: on real digits, in two processes, stopped, on bad disks."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from clipquant import QuantizeOnFitEnd, TwoConvNet, load_quantized
from clipquant.artifact import read_metadata
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.codes.tensor import dequantize
from clipquant.quant.methods.rtn import quantize_weight
from clipquant.quant.network.layers import select
from clipquant.reference import MNIST5k

sys.path.insert(0, str(Path(__file__).parent))
from small_fit import QUIET, Small, fit, loader


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """TwoConvNet trained on real digits, quantized to 8 bits at the end."""
    pl.seed_everything(1, verbose=False)
    data, callback = MNIST5k(batch_size=32), QuantizeOnFitEnd(8)
    model = TwoConvNet(lr=0.002, schedule="one_cycle")  # one epoch suffices
    folder = tmp_path_factory.mktemp("digits")
    trainer = pl.Trainer(
        callbacks=[callback],
        max_epochs=1,
        default_root_dir=folder,
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(model, data)
    return trainer, model, data, callback


def test_real_digits_survive_8_bits(digits):
    _, _, _, callback = digits
    before, after = callback.report.float_metrics, callback.report.quantized_metrics
    assert before["val_acc"] > 0.94
    assert after["val_acc"] >= before["val_acc"] - 0.003
    assert callback.report.size_bytes == callback.artifact_path.stat().st_size
    assert callback.report.ratio > 3.9


def test_raw_codes_left_in_the_weights_destroy_the_network(digits):
    """What the reference definition leaves open, measured: the codes must be mapped back."""
    trainer, model, data, _ = digits
    raw, restored = TwoConvNet(), TwoConvNet()
    for net, restore in ((raw, False), (restored, True)):
        net.load_state_dict(model.state_dict())
        for target in select(net).targets:
            codes = quantize_weight(target.weight, QuantSpec(8, 8, False, "tensor"))
            value = (
                dequantize(codes) if restore else codes.codes.float().reshape(codes.layout.shape)
            )
            target.weight.data.copy_(value)
    judge = pl.Trainer(**QUIET, enable_checkpointing=False)
    accuracy = [
        judge.test(net, data, verbose=False)[0]["test_acc"] for net in (model, raw, restored)
    ]
    assert accuracy[1] < 0.2
    assert accuracy[2] > accuracy[0] - 0.05  # nine codes a tensor, still a network


def test_the_accuracy_of_a_fresh_process_is_equal_to_the_last_digit(digits, tmp_path):
    trainer, model, data, callback = digits
    here = pl.Trainer(**QUIET, enable_checkpointing=False).test(model, data, verbose=False)
    script = f"""
        import lightning.pytorch as pl
        from clipquant import TwoConvNet, load_quantized
        from clipquant.reference import MNIST5k
        model = TwoConvNet()
        model.load_state_dict(load_quantized({str(callback.artifact_path)!r}), strict=True)
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False,
                             enable_checkpointing=False, enable_model_summary=False)
        metrics = trainer.test(model, MNIST5k(), verbose=False)[0]
        print("there:", {{name: value.hex() for name, value in metrics.items()}})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    there = {name: value.hex() for name, value in here[0].items()}
    assert f"there: {there}" in done.stdout, done.stderr


def test_the_module_keeps_class_keys_and_dtype_and_gives_what_the_file_gives(tmp_path):
    callback = QuantizeOnFitEnd(4, granularity=16)
    keys = Small().state_dict().keys()
    _, model = fit(callback, tmp_path)
    assert type(model) is Small
    assert model.state_dict().keys() == keys
    loaded = load_quantized(callback.artifact_path, Small())
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert all(v.dtype == torch.float32 for v in model.state_dict().values())


def test_the_reference_quantization_leaves_nine_values_a_tensor(tmp_path):
    callback = QuantizeOnFitEnd(8, levels=8, symmetric=False, granularity="tensor", method="rtn")
    _, model = fit(callback, tmp_path)
    assert len(model.net[3].weight.unique()) == 9


def test_metrics_are_of_the_same_batches_with_no_trace_in_the_outer_trainer(tmp_path):
    callback = QuantizeOnFitEnd(8)
    trainer, model = fit(callback, tmp_path)
    assert model.trainer is trainer
    assert trainer.state.fn == "fit"
    validate = pl.Trainer(**QUIET, enable_checkpointing=False).validate
    judged = validate(model, loader(), verbose=False)[0]
    assert callback.report.quantized_metrics == pytest.approx(judged, abs=0)


def test_the_random_state_is_left_as_it_was(tmp_path):
    draws = []
    for callback in (pl.Callback(), QuantizeOnFitEnd(8)):
        pl.seed_everything(3, verbose=False)
        fit(callback, tmp_path)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


def test_monitor_and_mode_are_those_of_the_checkpoint(tmp_path):
    callback = QuantizeOnFitEnd(8)
    checkpoint = ModelCheckpoint(tmp_path / "kept", monitor="val_acc", mode="max")
    fit(callback, tmp_path, callbacks=[checkpoint], enable_checkpointing=True)
    assert (callback.report.monitor, callback.report.mode) == ("val_acc", "max")
    fit(callback := QuantizeOnFitEnd(8), tmp_path)
    assert (callback.report.monitor, callback.report.mode) == ("val_loss", "min")


def test_the_best_weights_are_those_of_the_best_checkpoint(tmp_path):
    callback = QuantizeOnFitEnd(8, weights="best")
    checkpoint = ModelCheckpoint(tmp_path / "kept", monitor="val_loss")

    class Unsteady(Small):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 3.0)

    _, model = fit(
        callback, tmp_path, Unsteady(), [checkpoint], enable_checkpointing=True, max_epochs=4
    )
    best = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    score = float(checkpoint.best_model_score)
    assert callback.report.float_metrics["val_loss"] == pytest.approx(score, rel=1e-6)
    restored = model.state_dict()["net.3.weight"]
    assert (restored - best["net.3.weight"]).abs().max() <= best["net.3.weight"].abs().max() / 250


def test_no_validation_data_is_no_obstacle(tmp_path):
    callback, model = QuantizeOnFitEnd(8), Small()
    trainer = pl.Trainer(
        callbacks=[callback], default_root_dir=tmp_path, max_epochs=1, enable_checkpointing=False,
        **QUIET,
    )  # fmt: skip
    trainer.fit(model, loader())
    assert callback.report.float_metrics == {}
    assert callback.artifact_path.exists()


def test_nothing_but_the_fit_starts_it(tmp_path):
    trainer = pl.Trainer(callbacks=[callback := QuantizeOnFitEnd(8)], **QUIET)
    trainer.validate(Small(), loader(), verbose=False)
    assert callback.report is None


def test_max_steps_0_says_that_nothing_was_trained(tmp_path):
    with pytest.warns(UserWarning, match="No optimizer step was taken"):
        fit(callback := QuantizeOnFitEnd(8), tmp_path, max_steps=0, max_epochs=None)
    assert callback.artifact_path.exists()


def test_weights_that_became_nan_stay_in_float_and_the_rest_is_kept(tmp_path):
    class Diverging(Small):
        def on_train_end(self):
            self.net[3].weight.data[0, 0] = float("nan")

    model, callback = Diverging(), QuantizeOnFitEnd(8)
    with pytest.warns(UserWarning, match=r"net\.3\.weight \(1 of 1440\).*net\.3\.weight in float"):
        fit(callback, tmp_path, model)
    assert int(model.net[3].weight.isnan().sum()) == 1
    assert [layer.name for layer in callback.report.layers] == ["net.0.weight"]
    assert "net.3.weight (1 of 1440)" in callback.report.failures[0]
    stored = load_quantized(callback.artifact_path)
    assert torch.equal(stored["net.3.weight"].isnan(), model.net[3].weight.isnan())


def test_a_glob_without_a_match_is_refused_before_training(tmp_path):
    class Untrained(Small):
        def training_step(self, batch, i):
            raise AssertionError("trained")

    with pytest.raises(ValueError, match=r"include=\['head.\*'\] matches no parameter"):
        fit(QuantizeOnFitEnd(8, include=["head.*"]), tmp_path, Untrained())


def test_a_model_without_layers_to_quantize_is_refused_before_training(tmp_path):
    class Scale(Small):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))

    with pytest.raises(ValueError, match="no weight to quantize"):
        fit(QuantizeOnFitEnd(8), tmp_path, Scale())


def test_a_folder_that_cannot_be_written_is_told_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="set dirpath to a folder that is writable"):
        fit(QuantizeOnFitEnd(8, dirpath=tmp_path / "file" / "quantized"), tmp_path)


def test_a_disk_that_fills_during_the_fit_leaves_the_trained_module_and_checkpoints(
    tmp_path, monkeypatch
):
    class Filling(Small):
        def on_train_end(self):
            self.trained = {k: v.clone() for k, v in self.state_dict().items()}

            def full(_):
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(os, "fsync", full)

    model, checkpoint = Filling(), ModelCheckpoint(tmp_path / "kept")
    callback = QuantizeOnFitEnd(8, dirpath=tmp_path / "out")
    with pytest.warns(
        UserWarning, match=r"No space left.*Make room, then: clipquant\.quantize\(module"
    ):
        fit(callback, tmp_path, model, [checkpoint], enable_checkpointing=True)
    assert callback.artifact_path is None
    assert "No space left" in callback.report.failures[0]
    assert all(torch.equal(v, model.trained[k]) for k, v in model.state_dict().items())
    assert list((tmp_path / "out").iterdir()) == []
    kept = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(v, kept[k]) for k, v in model.trained.items())


def test_best_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"weights='best' needs a ModelCheckpoint"):
        fit(QuantizeOnFitEnd(8, weights="best"), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"bits": 0}, "bits must be a whole number from 1 to 8; got 0"),
        ({"bits": 9}, "got 9"),
        ({"bits": 3.5}, "got 3.5"),
        ({"bits": "eight"}, "got 'eight'"),
        ({"levels": 0}, "levels .* got 0"),
        ({"max_drop": 0.01}, "need bits='auto'.*got bits=8 with max_drop=0.01"),
        ({"bits": "auto"}, "needs max_drop or max_size"),
        ({"method": "awq"}, "method must be one of .*'awq'"),
        ({"weights": "first"}, "weights must be one of 'last', 'best'"),
        ({"on_fail": "ignore"}, "on_fail must be one of"),
        ({"calibration_batches": -1}, "calibration_batches .* got -1"),
    ],
)
def test_arguments_that_cannot_be_are_refused_at_once(arguments, text):
    with pytest.raises(ValueError, match=text):
        QuantizeOnFitEnd(**arguments)


def test_ctrl_c_says_that_nothing_was_quantized(tmp_path):
    class Stopped(Small):
        def on_train_batch_end(self, *_):
            if self.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    # A parent in the background may ignore the signal, and Lightning ignores it from the first on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with (
            pytest.warns(UserWarning, match="stopped by KeyboardInterrupt, so nothing was quant"),
            pytest.raises(SystemExit) as stopped,
        ):
            fit(QuantizeOnFitEnd(8, dirpath=tmp_path), tmp_path, Stopped())
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 1
    assert not list(tmp_path.glob("*.safetensors"))


class Normed(Small):
    def __init__(self):
        super().__init__()
        self.net.insert(1, nn.BatchNorm2d(4))


def test_batchnorm_follows_weights_rounded_without_data(tmp_path):
    callbacks = [
        QuantizeOnFitEnd(2, method="rtn", calibration_batches=n, dirpath=tmp_path / str(n))
        for n in (0, 2)
    ]
    for callback in callbacks:
        torch.manual_seed(0)
        fit(callback, tmp_path, Normed())
    why = [{item.name: item.why for item in c.report.left} for c in callbacks]
    assert "re-estimated" not in why[0]["net.1.running_mean"]
    assert "re-estimated" in why[1]["net.1.running_mean"]


def test_a_disk_that_fills_up_after_the_file_leaves_a_report_of_that_file(tmp_path, monkeypatch):
    """The report stands beside the file before anything else is measured; a later one that fails leaves it whole."""

    def fill(*args, **kwargs):
        def full(handle):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)

    monkeypatch.setattr("clipquant.callbacks.fit_end.export_files", fill)
    callback = QuantizeOnFitEnd(4, method="rtn", dirpath=tmp_path)
    with pytest.warns(UserWarning, match=r"writing the report failed .*report\.json"):
        fit(callback, tmp_path)
    held = json.loads((tmp_path / "report.json").read_text())
    assert held["sha256"] == read_metadata(callback.artifact_path)["sha256"]
    assert "</html>" in (tmp_path / "report.html").read_text()
