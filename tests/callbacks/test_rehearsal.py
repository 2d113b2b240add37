"""What would fail after training is told before the first step; and a rehearsal changes nothing of a training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from clipquant import QuantizeOnFitEnd
from clipquant.callbacks.failures import QuantizationError

sys.path.insert(0, str(Path(__file__).parent))
from small_fit import Net, rows


def fit(
    net: Any, tmp_path: Any, *callbacks: Any, train: Any = None, val: Any = None, **given: Any
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=list(callbacks), default_root_dir=tmp_path,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **given,
    )  # fmt: skip
    trainer.fit(net, train or rows(), val or rows())
    return trainer


class Fails(Net):
    """Its validation step works in the sanity check alone."""

    def validation_step(self, batch: Any, index: int) -> None:
        if not self.trainer.sanity_checking:
            raise KeyError("lost")
        super().validation_step(batch, index)


def test_what_fails_is_told_before_the_first_step(tmp_path: Any) -> None:
    net = Fails()
    with (
        pytest.warns(
            UserWarning,
            match=r"Rehearsal .*judging by one validation batch failed \(KeyError: 'lost'\)",
        ),
        pytest.raises(KeyError),
    ):
        fit(net, tmp_path, QuantizeOnFitEnd(4, dirpath=tmp_path))
    with pytest.raises(QuantizationError, match="before training: judging"):
        fit(net := Fails(), tmp_path, QuantizeOnFitEnd(4, dirpath=tmp_path, on_fail="raise"))
    assert net.trained == 0


def test_a_training_is_the_same_with_a_rehearsal_and_without(tmp_path: Any) -> None:
    found = []
    for given in ({"num_sanity_val_steps": 0}, {"num_sanity_val_steps": 2}):
        pl.seed_everything(0, verbose=False)
        weights: dict[str, Any] = {}
        net = Net()

        class Keep(pl.Callback):
            def on_train_end(self, trainer: Any, module: Any, kept: Any = weights) -> None:
                kept.update({k: v.clone() for k, v in module.state_dict().items()})

        fit(net, tmp_path, Keep(), QuantizeOnFitEnd(4, dirpath=tmp_path), train=rows(True), **given)
        found.append((weights, net.trained, net.validated - given["num_sanity_val_steps"]))
    assert found[0][1:] == found[1][1:] == (4, 4)
    assert all(torch.equal(v, found[1][0][k]) for k, v in found[0][0].items())


class Once:
    """Gives its batches a single time."""

    def __init__(self) -> None:
        self.batches = iter(list(rows()))

    def __iter__(self) -> Any:
        return self.batches


def test_data_that_come_only_once_are_not_used_up(tmp_path: Any) -> None:
    net, callback = Net(), QuantizeOnFitEnd(4, dirpath=tmp_path)
    fit(net, tmp_path, callback, train=Once())
    assert net.trained == 4
    assert "validation dataloader" in callback.report.calibration  # the train data are gone
    assert callback.report.failures == ()


def test_no_sanity_check_means_no_rehearsal(tmp_path: Any, recwarn: Any) -> None:
    with pytest.raises(KeyError):
        fit(Fails(), tmp_path, QuantizeOnFitEnd(4, dirpath=tmp_path), num_sanity_val_steps=0)
    assert not [w for w in recwarn if "Rehearsal" in str(w.message)]


def test_a_dry_run_writes_nothing_where_a_real_one_has(tmp_path: Any) -> None:
    first = QuantizeOnFitEnd(8, dirpath=tmp_path)
    fit(Net(), tmp_path, first)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    second = QuantizeOnFitEnd(4, dirpath=tmp_path, weights="best")
    fit(Net(), tmp_path, second, fast_dev_run=True)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()} == before
    assert second.artifact_path.is_file()
    assert tmp_path not in second.artifact_path.parents


class Silent(Net):
    def validation_step(self, batch: Any, _: int) -> None:
        if self.trainer.sanity_checking:
            return
        super().validation_step(batch, 0)


def test_a_metric_that_the_sanity_check_skips_is_found(tmp_path: Any) -> None:
    callback = QuantizeOnFitEnd("auto", max_drop=5.0, dirpath=tmp_path)
    fit(Silent(), tmp_path, callback)
    assert callback.report.monitor == "val_loss"
    assert callback.report.failures == ()


def test_a_monitor_that_is_never_logged_is_told_with_what_is(tmp_path: Any) -> None:
    callback = QuantizeOnFitEnd(8, monitor="val_f1", dirpath=tmp_path)
    with pytest.warns(
        UserWarning, match="it is 'val_f1', which validation does not log; logged are val_loss"
    ):
        fit(Net(), tmp_path, callback)


def test_the_metric_of_the_first_of_several_loaders_is_found(tmp_path: Any) -> None:
    class Two(Net):
        def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, index)

    callback = QuantizeOnFitEnd("auto", max_drop=5.0, dirpath=tmp_path)
    fit(Two(), tmp_path, callback, val=[rows(), rows()])
    assert callback.report.monitor == "val_loss/dataloader_idx_0"
    assert callback.report.budget.met
