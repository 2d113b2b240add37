"""Recurrent layers are traced in a time that does not grow with their steps, and all is put back."""

import pytest
import torch
from torch import nn

from clipquant.export import Example
from clipquant.export.parts import steps
from clipquant.export.parts.capture import capture
from clipquant.export.parts.steps import steps_untraced


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(("first", "both", "layers"), [(True, True, 2), (False, False, 1)])
def test_no_step_is_traced_and_outputs_are_the_layers_own(kind, first, both, layers, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a step was traced")

    for cell in ("gru_cell", "one_layer_lstm", "one_layer_rnn"):
        monkeypatch.setattr(f"torch._decomp.decompositions.{cell}", never)
    torch.manual_seed(0)
    layer = kind(8, 4, layers, batch_first=first, bidirectional=both).eval()
    x = Example((torch.randn(3, 6, 8),))
    captured = capture(layer, x)
    for expected, actual in zip(
        torch.utils._pytree.tree_leaves(x.run(layer)),
        torch.utils._pytree.tree_leaves(x.run(captured.program.module())),
        strict=True,
    ):
        assert torch.allclose(expected, actual, atol=1e-6)


def test_kernels_are_put_back_whatever_happens():
    tables = [op.py_kernels for op in steps._operators()]
    before = [dict(table) for table in tables]

    def fail():
        assert [dict(table) for table in tables] != before
        raise ValueError("within")

    with pytest.raises(ValueError, match="within"), steps_untraced():
        fail()
    assert [dict(table) for table in tables] == before
