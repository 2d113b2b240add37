"""What a file says of how it was made: written and read back, and nothing else taken."""

from dataclasses import replace

import pytest

from clipquant.fields import FieldError
from clipquant.stored import (
    StoredBars,
    StoredBudget,
    StoredLayer,
    StoredReport,
    StoredTrial,
    read_stored,
    write_stored,
)

FULL = StoredReport(
    {"acc": 0.9, "loss": None}, {"acc": 0.8}, "acc", "max", -7, "16 batches", {"python": "3.11"},
    {"w": StoredLayer(20.5, None, "note", StoredBars(-1.0, 2.0, (0, 63, 5))), "v": StoredLayer()},
    StoredBudget(0.1, 3000, "missed", (StoredTrial(0, 0.8, "rows", True, 0.01), StoredTrial(9, None, "uniform", False)),
                 0.95, 0.97, "one batch"),
    ("exporting failed",), 0.01,
)  # fmt: skip


def test_what_was_written_is_read():
    for report in (FULL, StoredReport(), replace(FULL, budget=None)):
        held = write_stored(report)
        assert read_stored(held["report"], held["details"]) == report


def test_without_details_only_the_layers_are_missing():
    assert read_stored(write_stored(FULL)["report"]) == replace(FULL, layers={})


def test_version_1_has_the_layers_in_the_report():
    held = write_stored(FULL)
    assert read_stored({**held["report"], **held["details"]}) == FULL


@pytest.mark.parametrize(
    "wrong",
    [
        {"monitor": 3}, {"seed": "7"}, {"seed": True}, {"calibration": None}, {"environment": {"a": 1}},
        {"failures": "a"},
        {"drop_error": "a"}, {"budget": {"sure": "a"}}, {"budget": {"errors": [1]}}, {"budget": {"unsure": 1}},
        {"budget": 3}, {"budget": {"max_drop": "a"}}, {"budget": {"max_size": 1.5}}, {"budget": {"failure": 1}},
        {"layers": {"w": ["a", None, ""]}}, {"layers": {"w": [1, None, None]}}, {"metrics": [{}]},
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(wrong):
    with pytest.raises(FieldError, match=rf"report\.{next(iter(wrong))}"):
        read_stored(wrong)
