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
    monkeypatch.setattr(progress, "is_live", lambda: True)
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    with progress_bar() as tell:
        for step in range(4):
            tell(f"layer{step}.weight", step, 4)
            time.sleep(0.15)
        for step in range(3):
            tell("learned rounding", step, 10)
            time.sleep(0.15)
    shown = capsys.readouterr().err
    assert "Quantizing: layer2.weight" in shown
    assert "2/4" in shown
    assert "Quantizing: learned rounding" in shown
    assert "2/10" in shown
    assert "<" in shown  # elapsed<left


def test_it_can_be_switched_off(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with progress_bar(shown=False) as tell:
        tell("fc1.weight", 0, 2)
        time.sleep(0.02)
        tell("fc2.weight", 1, 2)
    assert capsys.readouterr().err == ""


def test_where_there_is_no_terminal_lines_come_and_few(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PAUSE", 0.2)
    with progress_bar() as tell:
        for step in range(20):
            tell("fc1.weight", step, 20)
            time.sleep(0.03)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3
    assert all(
        line.startswith("Quantizing: fc1.weight, ") and line.endswith(" of 20") for line in lines
    )


def test_one_bar_of_the_kind_given_serves_every_stage_and_a_long_name_is_cut(monkeypatch):
    made = []

    class Bar:
        n, total, closed = 0, None, False

        def __init__(self):
            made.append(self)
            self.said = []

        def reset(self, total=None):
            self.n, self.total = 0, total

        def set_description_str(self, desc=None, refresh=True):
            self.said.append(desc)

        def update(self, n=1):
            self.n += n

        def close(self):
            self.closed = True

    monkeypatch.setattr(progress, "is_live", lambda: True)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with progress_bar(make=Bar) as tell:
        for stage, total in (("judging", 3), ("blocks." * 20 + "weight", 5), ("judging", 3)):
            for step in range(total):
                tell(stage, step, total)
                assert (made[0].n, made[0].total) == (step, total)
    assert len(made) == 1
    assert made[0].closed
    assert max(map(len, made[0].said)) <= 60
    assert any(said.endswith("weight") for said in made[0].said)
