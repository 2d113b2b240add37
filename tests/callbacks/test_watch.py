"""Which metric judges and which way it is better: known, or asked for before the first step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanSquaredError

from clipquant import QuantizeOnFitEnd
from clipquant.errors import ArgumentError

sys.path.insert(0, str(Path(__file__).parent))
from small_fit import Net, rows


def fit(net: Any, tmp_path: Any, *callbacks: Any, val: Any = None, **given: Any) -> pl.Trainer:
    given = {"enable_checkpointing": False, **given}
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=list(callbacks), default_root_dir=tmp_path,
        logger=False, enable_progress_bar=False, enable_model_summary=False, **given,
    )  # fmt: skip
    trainer.fit(net, rows(), val or rows())
    return trainer


class Judged(Net):
    """Logs what it is told to, as an object or as a plain tensor."""

    def __init__(self, metric: Any = None, name: str = "val/acc", *, plain: bool = False) -> None:
        super().__init__()
        self.metric = MulticlassAccuracy(3) if metric is None else metric
        self.name, self.plain = name, plain

    def validation_step(self, batch: Any, _: int) -> None:
        out = self(batch[0])
        if isinstance(self.metric, MeanSquaredError):
            self.metric(out.argmax(1).float(), batch[1].float())
        else:
            self.metric(out, batch[1])
        self.log(self.name, self.metric.compute() if self.plain else self.metric)


def quantizer(tmp_path: Any, bits: Any = 4, **given: Any) -> QuantizeOnFitEnd:
    return QuantizeOnFitEnd(
        bits, monitor=given.pop("monitor", "val/acc"), dirpath=tmp_path / "q", **given
    )


def test_a_torchmetrics_object_says_which_way_and_the_table_says_so(
    tmp_path: Any, capsys: Any
) -> None:
    for metric, mode, way in ((None, "max", "higher"), (MeanSquaredError(), "min", "lower")):
        callback = quantizer(tmp_path)
        net = Judged(metric)
        fit(net, tmp_path, callback)
        assert (callback.report.monitor, callback.report.mode) == ("val/acc", mode)
        kind = type(net.metric).__name__
        assert f"val/acc judges: {way} is better, as {kind} says" in capsys.readouterr().out


def test_the_object_is_found_with_several_loaders_and_steps(tmp_path: Any) -> None:
    class Two(Judged):
        def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, index)

    callback = quantizer(tmp_path)
    fit(Two(), tmp_path, callback, val=[rows(), rows()])
    assert callback.report.monitor == "val/acc/dataloader_idx_0"
    assert callback.report.mode == "max"


@pytest.mark.parametrize("bits", [4, "auto"])
@pytest.mark.parametrize("sanity", [0, 2])
def test_an_unknown_way_is_an_error_before_the_first_step(
    tmp_path: Any, bits: Any, sanity: int
) -> None:
    net = Judged(plain=True)
    given = {"max_drop": 0.01} if bits == "auto" else {}
    with pytest.raises(
        ArgumentError, match=r"monitor='val/acc' without mode.*monitor=\"val/acc\", mode=\"max\""
    ):
        fit(net, tmp_path, quantizer(tmp_path, bits, **given), num_sanity_val_steps=sanity)
    assert net.trained == 0


class Plateau(Judged):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max")
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "val/acc"},
        }


@pytest.mark.parametrize(
    ("net", "other", "who"),
    [
        (
            Judged,
            lambda folder: ModelCheckpoint(folder, monitor="val/acc", mode="max"),
            "ModelCheckpoint",
        ),
        (Judged, lambda folder: EarlyStopping("val/acc", mode="max"), "EarlyStopping"),
        (Plateau, lambda folder: pl.Callback(), "ReduceLROnPlateau"),
    ],
)
@pytest.mark.parametrize("sanity", [0, 2])
def test_whoever_watches_the_same_metric_says_which_way(
    tmp_path: Any, net: Any, other: Any, who: str, sanity: int
) -> None:
    callback = quantizer(tmp_path)
    given = {"enable_checkpointing": who == "ModelCheckpoint", "num_sanity_val_steps": sanity}
    fit(net(plain=True), tmp_path, callback, other(tmp_path / "kept"), **given)
    assert callback.report.mode == "max"
    assert callback.report.mode_from == f"as {who} watches it"


def test_the_object_is_believed_against_a_forgotten_mode_and_that_is_told(tmp_path: Any) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "kept", monitor="val/acc")  # mode="min" by its default
    callback = quantizer(tmp_path)
    with pytest.warns(
        UserWarning, match=r"ModelCheckpoint watches it by mode='min'.*higher is better is taken"
    ):
        fit(Judged(), tmp_path, callback, checkpoint, enable_checkpointing=True)
    assert callback.report.mode == "max"


def test_a_given_mode_holds_and_what_speaks_against_it_is_told(tmp_path: Any) -> None:
    callback = quantizer(tmp_path, mode="min")
    with pytest.warns(UserWarning, match="MulticlassAccuracy says that higher is better"):
        fit(Judged(), tmp_path, callback)
    assert callback.report.mode == "min"


def test_a_loss_is_better_when_lower_and_no_name_else_says_anything(tmp_path: Any) -> None:
    callback = quantizer(tmp_path, monitor="val_loss")
    fit(Net(), tmp_path, callback, num_sanity_val_steps=0)
    assert (callback.report.mode, callback.report.mode_from) == ("min", "it is a loss")


def test_a_drop_that_no_accuracy_can_have_is_refused_before_the_first_step(tmp_path: Any) -> None:
    net = Judged()
    with pytest.raises(ArgumentError, match=r"max_drop=5 .*at most 1.*write max_drop=0.05"):
        fit(net, tmp_path, quantizer(tmp_path, "auto", max_drop=5))
    assert net.trained == 0
    with pytest.warns(UserWarning, match=r"max_drop=5 .*write max_drop=0.05"):
        fit(Judged(plain=True), tmp_path, quantizer(tmp_path, "auto", max_drop=5, mode="max"))


def test_a_mistyped_monitor_is_told_once_with_what_was_logged(tmp_path: Any, recwarn: Any) -> None:
    for sanity, begins in ((2, "Rehearsal"), (0, "QuantizeOnFitEnd")):
        recwarn.clear()
        callback = quantizer(tmp_path, monitor="val_axc", mode="max")
        fit(Judged(), tmp_path, callback, num_sanity_val_steps=sanity)
        told = [str(w.message) for w in recwarn if "val_axc" in str(w.message)]
        assert len(told) == 1
        assert told[0].startswith(begins)
        assert "val/acc" in told[0]
        assert callback.report.drop is None
        assert len(callback.report.failures) == 1


def test_without_validation_data_one_line_says_that_nothing_was_judged(
    tmp_path: Any, capsys: Any
) -> None:
    callback = QuantizeOnFitEnd(4, dirpath=tmp_path / "q")
    trainer = pl.Trainer(
        callbacks=[callback], max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(), rows())
    assert capsys.readouterr().out.count("Not judged") == 1
    assert callback.report.failures == ()


def test_warnings_show_no_source_of_ours(tmp_path: Any, recwarn: Any) -> None:
    fit(Judged(), tmp_path, quantizer(tmp_path, monitor="val_axc", mode="max"))
    own = [w for w in recwarn if "val_axc" in str(w.message)]
    assert [w.filename for w in own] == ["<clipquant>"]
