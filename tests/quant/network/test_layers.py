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


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))


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
