"""The bar of what takes long: nothing for what is quick, the weight and the time left for what is not."""

import time

from clipquant.report import progress
from clipquant.report.progress import progress_bar


def test_what_is_quick_shows_nothing(capsys):
    with progress_bar() as tell:
        for step in range(3):
            tell("fc1.weight", step, 3)
    assert capsys.readouterr().err == ""


def test_what_takes_long_shows_the_weight_and_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    with progress_bar() as tell:
        for step in range(4):
            tell(f"layer{step}.weight", step, 4)
            time.sleep(0.15)
        for step in range(3):
            tell("learned rounding", step, 10)
            time.sleep(0.15)
    shown = capsys.readouterr().err
    assert "Quantizing layer2.weight" in shown
    assert "2/4" in shown
    assert "Quantizing learned rounding" in shown
    assert "2/10" in shown
    assert "<" in shown  # elapsed<left


def test_it_can_be_switched_off(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with progress_bar(shown=False) as tell:
        tell("fc1.weight", 0, 2)
        time.sleep(0.02)
        tell("fc2.weight", 1, 2)
    assert capsys.readouterr().err == ""
