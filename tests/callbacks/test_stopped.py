"""A run that is stopped says what is whole and how to go on, and leaves no empty folder."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clipquant import QuantizeOnFitEnd, load_quantized
from clipquant.callbacks.stopped import stopped_at_end

SEEN: list[int] = []


class Net(pl.LightningModule):
    """Stops the process as Ctrl-C does, at a validation of choice after its training."""

    def __init__(self, stop_at: int) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.over, self.stop_at = False, stop_at

    def training_step(self, batch: Any, _: int) -> Any:
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def on_train_end(self) -> None:
        self.over = True

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.training_step(batch, index))
        if self.over:
            SEEN.append(index)  # attributes are put back after each pass
            if len(SEEN) == self.stop_at:
                os.kill(os.getpid(), signal.SIGINT)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def rows() -> Any:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 16)


def fit(net: Any, tmp_path: Any, *callbacks: Any, **given: Any) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    given = {"logger": False, "enable_checkpointing": False, **given}
    try:
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", callbacks=list(callbacks), default_root_dir=tmp_path,
            enable_progress_bar=False, enable_model_summary=False, **given,
        )  # fmt: skip
        trainer.fit(net, rows(), rows())
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_ctrl_c_while_quantizing_says_that_the_fit_was_complete_and_names_the_checkpoint(
    tmp_path: Any, recwarn: Any, stop_at: int
) -> None:
    SEEN.clear()
    callback = QuantizeOnFitEnd(4, dirpath=tmp_path / "out")
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(Net(stop_at), tmp_path, callback, enable_checkpointing=True)
    told = [w for w in recwarn if "topped" in str(w.message)]
    assert len(told) == 1
    said = str(told[0].message)
    assert "the fit was complete" in said
    assert "The fit was stopped" not in said
    assert told[0].filename == "<clipquant>"  # no line of source on the screen
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    assert f"Net.load_from_checkpoint({str(checkpoint)!r})" in said
    assert callback.artifact_path is None
    assert not (tmp_path / "out").exists()


def test_a_file_that_was_whole_is_named_and_not_denied(
    tmp_path: Any, recwarn: Any, monkeypatch: Any
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("clipquant.callbacks.fit_end.export_files", stop)
    callback = QuantizeOnFitEnd(4, dirpath=tmp_path / "out")
    with pytest.raises(SystemExit):
        fit(Net(-1), tmp_path, callback)
    said = next(str(w.message) for w in recwarn if "topped" in str(w.message))
    assert f"{callback.artifact_path} is whole" in said
    assert "nothing was quantized" not in said
    assert load_quantized(callback.artifact_path).keys() == Net(0).state_dict().keys()


def test_ctrl_c_in_training_leaves_no_empty_folder_but_one_that_was_there(tmp_path: Any) -> None:
    class Early(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.warns(UserWarning, match="so nothing was quantized"), pytest.raises(SystemExit):
        fit(Early(-1), tmp_path, QuantizeOnFitEnd(4, dirpath=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "own").mkdir()
    with pytest.warns(UserWarning, match="so nothing was quantized"), pytest.raises(SystemExit):
        fit(Early(-1), tmp_path, QuantizeOnFitEnd(4, dirpath=tmp_path / "own"))
    assert (tmp_path / "own").is_dir()


def test_a_run_from_a_configuration_names_the_command_that_repeats_the_step(tmp_path: Any) -> None:
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "a.ckpt").write_text("")
    kept = SimpleNamespace(best_model_path=str(tmp_path / "a.ckpt"), last_model_path="")
    trainer: Any = SimpleNamespace(log_dir=str(tmp_path), checkpoint_callbacks=[kept])
    said = stopped_at_end(QuantizeOnFitEnd(4).settings, trainer, tmp_path / "out", None)
    command = (
        f"clipquant quantize --config {tmp_path / 'config.yaml'} --ckpt_path {tmp_path / 'a.ckpt'}"
    )
    assert said.endswith(command)


def test_repeated_runs_without_a_logger_replace_nothing(tmp_path: Any) -> None:
    paths = []
    for _ in range(3):
        callbacks = [QuantizeOnFitEnd(4), QuantizeOnFitEnd(8)]
        fit(Net(-1), tmp_path, *callbacks)
        paths += [Path(callback.artifact_path).parent.name for callback in callbacks]
    assert paths == ["quantized", *(f"quantized-{number}" for number in range(2, 7))]
