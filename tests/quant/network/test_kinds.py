import pytest
import torch
from torch import nn

from clipquant.quant.network.layers import select


class MyLinear(nn.Linear):
    pass


class Experts(nn.Module):
    def __init__(self, *sizes, bias=0, **said):
        super().__init__()
        self.up = nn.Parameter(torch.randn(sizes))
        if bias:
            self.up_bias = nn.Parameter(torch.randn(sizes[0], bias))
        self.down = nn.Parameter(torch.randn(sizes[0], *sizes[:0:-1]))
        vars(self).update(said)


class ParallelExperts(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(sizes))


KINDS = {
    "Conv1d": (nn.Conv1d(2, 4, 3), ["weight"], 4),
    "Conv2d depthwise": (nn.Conv2d(4, 4, 3, groups=4), ["weight"], 4),
    "Conv3d": (nn.Conv3d(2, 4, 1), ["weight"], 4),
    "ConvTranspose1d": (nn.ConvTranspose1d(2, 4, 3), ["weight"], 4),
    "ConvTranspose2d grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), ["weight"], 6),
    "ConvTranspose3d": (nn.ConvTranspose3d(2, 4, 1), ["weight"], 4),
    "Linear": (nn.Linear(3, 4), ["weight"], 4),
    "a subclass": (MyLinear(3, 4), ["weight"], 4),
    "Embedding": (nn.Embedding(5, 3), ["weight"], 5),
    "EmbeddingBag": (nn.EmbeddingBag(5, 3), ["weight"], 5),
    "attention": (nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"], 12),
    "attention of three widths": (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        4,
    ),
    "LSTM": (nn.LSTM(3, 4, proj_size=2), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"], 16),
    "GRU": (nn.GRU(3, 4), ["weight_ih_l0", "weight_hh_l0"], 12),
    "Bilinear": (nn.Bilinear(2, 3, 4), ["weight"], 4),
    "experts": (Experts(2, 3, 5), ["up", "down"], 10),
    "experts as transformers holds them": (
        Experts(2, 5, 3, is_transposed=False),
        ["up", "down"],
        10,
    ),
    "experts with biases": (Experts(2, 5, 3, bias=5), ["up", "down"], 10),
    "experts with a weight": (ParallelExperts(2, 5, 3), ["weight"], 10),
    "LSTMCell": (nn.LSTMCell(3, 4), ["weight_ih", "weight_hh"], 16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_is_found_with_its_output_channels(kind):
    module, names, rows = KINDS[kind]
    targets = select(module).targets
    assert [target.name for target in targets] == names
    assert targets[0].layout.rows == rows
    for target in targets:
        assert torch.equal(target.layout.unfold(target.layout.fold(target.weight)), target.weight)
