"""One display at a fit's end, as the user's own bar looks; and nothing of it where no bar is wanted."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import nn

from clipquant.callbacks.screen import display
from clipquant.report import progress


class Own(TQDMProgressBar):
    """A user's class of bar."""

    made = 0

    def init_predict_tqdm(self) -> Any:
        Own.made += 1
        return super().init_predict_tqdm()


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)


def trainer(bar: Any) -> pl.Trainer:
    callbacks = [] if bar is None else [bar]
    made = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks,
        enable_progress_bar=bar is not None,
    )  # fmt: skip
    made.strategy._lightning_module = Net()
    if bar is not None:
        bar.setup(made, made.lightning_module, "fit")
    return made


def told(bar: Any) -> None:
    with display(trainer(bar)) as tell:
        for stage in (
            "judging the float weights",
            "[red]conv.weight",
            "judging the quantized weights",
        ):
            for step in range(3):
                tell(stage, step, 3)


@pytest.mark.parametrize("kind", [Own, RichProgressBar])
def test_every_stage_is_shown_and_nothing_stays(kind: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "is_live", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    # A console of its own: what an interrupted fit of another test left live on rich's one would hide this.
    monkeypatch.setattr("rich._console", None)
    before = Own.made
    told(kind())
    shown = "".join(capsys.readouterr())
    assert "judging the" in shown
    assert Own.made - before == (kind is Own)
    assert "Predicting" not in shown  # as Lightning's bar would begin
    assert shown.rstrip("\r\n ").count("\n") < 12


def test_without_a_bar_what_is_quick_prints_nothing(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(progress, "is_live", lambda: True)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    capsys.readouterr()
    made = trainer(None)
    capsys.readouterr()
    with display(made) as tell:
        tell("judging", 0, 3)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    with display(made) as tell:
        tell("judging", 0, 3)
    assert capsys.readouterr().err == "Quantizing: judging, 0 of 3\n"


def test_other_processes_show_nothing(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    made = trainer(None)
    monkeypatch.setattr(type(made), "is_global_zero", False)
    capsys.readouterr()
    with display(made) as tell:
        tell("judging", 0, 3)
    assert capsys.readouterr() == ("", "")
