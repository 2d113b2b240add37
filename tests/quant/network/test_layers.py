import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from clipquant.quant.network.layers import select


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7)
        self.out.weight = self.embed.weight


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


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))


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


def test_every_floating_tensor_is_quantized_or_listed_with_a_reason():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        Mixing(),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
    )
    selection = select(model, exclude=None)
    named = {t.name for t in selection.targets} | {item.name for item in selection.left}
    floating = {k for k, v in model.state_dict().items() if v.is_floating_point()}
    assert named == floating
    why = {item.name: item.why for item in selection.left}
    assert "Mixing" in why["2.weight"]
    assert "parametrized" in why["3.parametrizations.weight.original1"]
    assert "parametrized" in why["4.parametrizations.weight.original"]
    assert all(item.bytes == model.state_dict()[item.name].nbytes for item in selection.left)


def test_the_old_weight_norm_is_listed_too():
    model = nn.Sequential(nn.Linear(3, 3), torch.nn.utils.weight_norm(nn.Linear(3, 3)))
    selection = select(model)
    assert [t.name for t in selection.targets] == ["0.weight"]
    why = {item.name: item.why for item in selection.left}
    assert "norm" in why["1.weight_v"]


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRUCell])
def test_recurrent_weights_that_are_rebuilt_are_listed_and_the_others_quantized(make):
    names = [name for name, p in make(3, 4).named_parameters() if p.dim() == 2]
    pruned, normed = make(3, 4), make(3, 4)
    prune.l1_unstructured(pruned, names[1], 0.5)
    torch.nn.utils.weight_norm(normed, names[1])
    for module, ends in ((pruned, ("_orig", "_mask")), (normed, ("_g", "_v"))):
        selection = select(module)
        assert [t.name for t in selection.targets] == names[:1]
        why = {item.name: item.why for item in selection.left}
        assert all("prun" in why[names[1] + end] for end in ends)


def test_a_tied_weight_is_held_once():
    selection = select(Decoder())
    assert [target.name for target in selection.targets] == ["embed.weight"]
    assert selection.aliases == {"out.weight": "embed.weight"}


def test_include_and_exclude_are_globs_over_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert [t.name for t in select(model, include=["[01].*"]).targets] == ["0.weight", "1.weight"]
    selection = select(model, exclude=["1.weight"])
    assert [t.name for t in selection.targets] == ["0.weight", "2.weight"]
    assert {item.name: item.why for item in selection.left}["1.weight"] == "excluded"


def test_a_glob_that_matches_nothing_is_refused_naming_what_there_is():
    with pytest.raises(ValueError, match=r"exclude=\['head.\*'\] matches no parameter.*weight"):
        select(nn.Linear(2, 2), exclude=["head.*"])


def test_a_model_with_nothing_to_quantize_is_refused():
    with pytest.raises(ValueError, match="no weight to quantize"):
        select(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match=r"exclude=\['\*'\]"):
        select(nn.Linear(2, 2), exclude=["*"])


class OwnLinear(nn.Module):
    """Of no known class."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.gain = nn.Parameter(torch.ones(4))


def test_a_parameter_of_an_unknown_layer_is_quantized_where_include_names_it():
    model = nn.Sequential(nn.Linear(3, 3), OwnLinear())
    assert [t.name for t in select(model).targets] == ["0.weight"]
    why = {item.name: item.why for item in select(model).left}["1.matrix"]
    assert why == "OwnLinear is not a layer that is quantized unless its weight is named in include"
    assert [t.name for t in select(model, include=["1.*"]).targets] == ["1.matrix"]


def test_a_model_of_unknown_layers_alone_is_quantized():
    assert [t.name for t in select(OwnLinear()).targets] == ["matrix"]


def test_layers_that_are_not_built_yet_are_left():
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2))
    assert [t.name for t in select(model).targets] == ["0.weight"]
