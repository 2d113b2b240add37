"""A module as a graph: any batch where forward allows it, its chatter kept, its reason given."""

import logging
import sys
import warnings

import pytest
import torch
from torch import nn

from clipquant.export import Example, ExportError
from clipquant.export.example import largest_difference
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


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer = (
            nn.Embedding(20, 16),
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        )

    def forward(self, ids, mask):
        return self.layer(self.table(ids), src_key_padding_mask=mask == 0).mean(1)


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.Tanh()), (torch.randn(2, 6, 8),)),
        (nn.Conv1d(4, 3, 3, padding=1), (torch.randn(2, 4, 9),)),
        (Attends(), (torch.randint(0, 20, (2, 7)), torch.ones(2, 7).long())),
        (nn.LSTM(8, 4, batch_first=True, bidirectional=True), (torch.randn(2, 6, 8),)),
    ],
    ids=["linear", "conv1d", "attention", "lstm"],
)
def test_lengths_stay_open_where_the_model_takes_any(model, call):
    captured = capture(model.eval(), Example(call))
    assert captured.notes == ()
    axis = 2 if isinstance(model, nn.Conv1d) else 1
    longer = Example(tuple(torch.cat([t, t, t], axis) for t in call)).resized(5)
    assert largest_difference(longer.run(model), longer.run(captured.program.module())) < 1e-5


class FixedLength(nn.Module):
    def forward(self, x):
        return x.reshape(x.shape[0], 12) + (x.sum() * 0)


def test_a_length_that_the_model_fixes_leaves_the_batch_open():
    captured = capture(FixedLength(), Example((torch.randn(2, 4, 3),)))
    assert captured.dynamic
    assert captured.check.run(captured.program.module()).shape == (3, 12)


class Wrong(nn.Module):
    """Another function of the length than what is traced."""

    def forward(self, x):
        return x * len(x.tolist()[0]) if not torch.compiler.is_exporting() else x * 4


def test_a_trace_that_is_wrong_at_another_length_is_not_taken():
    captured = capture(Wrong(), Example((torch.randn(2, 4),)))
    assert captured.dynamic
    assert "fixed at [(4,)]" in captured.notes[0]
    assert "differ" in captured.notes[0]


class Keywords(nn.Module):
    def forward(self, first, **batch):
        return first + batch["x"] * batch["y"]


def test_keywords_of_any_name_leave_the_batch_open():
    x = torch.randn(4, 3)
    captured = capture(Keywords(), Example((x,), {"x": x, "y": x}))
    assert captured.dynamic
    assert captured.notes == ()
