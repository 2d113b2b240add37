"""A module as a graph: any batch where forward allows it, its chatter kept, its reason given."""

import logging
import sys
import warnings

import pytest
import torch
from torch import nn

from clipquant.export import Example, ExportError
from clipquant.export.parts.capture import capture, quiet


def test_any_batch_is_taken_and_outputs_are_compared_at_one_that_was_not_traced():
    captured = capture(nn.Linear(3, 2), Example((torch.zeros(5, 3),)))
    assert captured.dynamic
    assert captured.notes == ()
    assert captured.check.batch_size != captured.example.batch_size
    assert captured.check.run(captured.program.module()).shape == (3, 2)


class Reshaped(nn.Module):
    def forward(self, x):
        return x.reshape(5, 3)


def test_a_fixed_batch_is_traced_as_it_is_and_noted_with_the_reason():
    captured = capture(Reshaped(), Example((torch.zeros(5, 3),)))
    assert not captured.dynamic
    assert captured.check is captured.example
    assert "input shapes are fixed at [(5, 3)]: " in captured.notes[0]


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_what_cannot_be_traced_is_named_with_a_remedy():
    with pytest.raises(ExportError, match=r"cannot capture Branches\.forward: .*torch\.where"):
        capture(Branches(), Example((torch.zeros(5, 3),)))


def test_the_mode_becomes_eval():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    capture(model, Example((torch.zeros(5, 3),)))
    assert not model.training


def test_quiet_keeps_chatter_off_the_screen_and_puts_all_back(capsys, recwarn):
    before = logging.root.manager.disable

    def chat():
        print("chatter")
        print("chatter", file=sys.stderr)
        warnings.warn("chatter", stacklevel=1)
        logging.getLogger("torch").error("chatter")
        raise ValueError("from within")

    with pytest.raises(ValueError, match="from within"), quiet():
        chat()
    assert logging.root.manager.disable == before
    assert capsys.readouterr() == ("", "")
    assert not [warning for warning in recwarn if "chatter" in str(warning.message)]
