import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from clipquant.quant.codes.grid import Coded, row_levels
from clipquant.quant.packed import layers, products
from clipquant.quant.packed.modules import packed_copy
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe

EXACT = 4e-6  # of the largest output: what float32 itself is off by


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Spans of eight rows, and no layer too small."""
    monkeypatch.setattr(products, "BLOCK", 1)
    monkeypatch.setattr("clipquant.quant.packed.weight.BLOCK", 1)
    monkeypatch.setattr(products, "SPAN", 1)


@pytest.fixture
def taken(monkeypatch):
    """Which way each product went."""
    ways = []
    for name in ("_by_digits", "_by_floats"):
        run = getattr(products, name)

        def spy(x, weight, run=run, name=name):
            ways.append(name)
            return run(x, weight)

        monkeypatch.setattr(products, name, spy)
    return ways


def with_rows(weights):
    """The weights with 0 to 8 bits a row."""
    tensor = weights.tensors["weight"]
    bits = torch.arange(tensor.layout.rows).mul(5).remainder(9).to(torch.uint8)
    codes = (tensor.codes % (2 ** bits.long())[:, None]).to(torch.uint8)
    grid = replace(tensor.grid, levels=row_levels(bits))
    return replace(
        weights, tensors={"weight": replace(tensor, coded=Coded(codes, grid), bits=bits)}
    )


def packed_and_exact(layer, weights, x):
    """Return the packed layer's outputs, and those of the dequantized weights in float64."""
    plain = copy.deepcopy(layer).double()
    plain.load_state_dict(weights.state_dict())
    with torch.no_grad():
        return packed_copy(layer, weights)(x), plain(x.double())


def apart(found, exact):
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("granularity", ["tensor", "channel", 8, 4])
@pytest.mark.parametrize("bits", [*range(1, 9), "rows"])
def test_outputs_are_those_of_the_dequantized_weights(bits, granularity, taken):
    torch.manual_seed(0)
    layer = nn.Linear(24, 19)
    if bits == "rows" and granularity == "tensor":
        granularity = "channel"
    for symmetric in (True, False) if bits != 1 else (False,):
        recipe = Recipe(
            8 if bits == "rows" else bits,
            granularity=granularity,
            symmetric=symmetric,
            method="rtn",
        )
        weights = quantize_weights(layer, recipe)
        weights = with_rows(weights) if bits == "rows" else weights
        for x in (torch.randn(1, 24), torch.randn(2, 7, 24).relu(), 1e4 * torch.randn(24)):
            found, exact = packed_and_exact(layer, weights, x)
            assert found.shape == exact.shape
            assert apart(found, exact) <= EXACT
    whole = products.whole_numbers_are_exact() and isinstance(granularity, str)
    assert set(taken) == {"_by_digits" if whole else "_by_floats"}


@pytest.mark.parametrize("columns", [5, 9])
def test_columns_that_fill_no_byte(columns, taken):
    layer = nn.Linear(columns, 19, bias=False)
    for bits in (1, 2, 4):
        found, exact = packed_and_exact(
            layer, quantize_weights(layer, Recipe(bits, method="rtn")), torch.randn(3, columns)
        )
        assert apart(found, exact) <= EXACT
    assert len(taken) == 3


def test_a_row_of_zeros_and_one_of_the_smallest_give_what_they_are_worth():
    layer = nn.Linear(8, 16, bias=False)
    weights = quantize_weights(layer, Recipe(8, method="rtn"))
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e-42), torch.full((8,), 1e30)])
    found, exact = packed_and_exact(layer, weights, x)
    assert torch.equal(found[0], torch.zeros(16))
    assert float(found[1].abs().max()) <= 1e-29
    assert apart(found[2], exact[2]) <= EXACT


def test_infinities_and_nan_come_through_as_they_do_in_floats(taken):
    layer = nn.Linear(8, 16)
    weights = quantize_weights(layer, Recipe(8, method="rtn"))
    for value in (torch.inf, torch.nan):
        x = torch.randn(2, 8)
        x[1, 3] = value
        found, exact = packed_and_exact(layer, weights, x)
        assert torch.equal(found.isnan(), exact.float().isnan())
        assert apart(found[:1], exact[:1]) <= EXACT
    assert set(taken) == {"_by_floats"}


def test_no_inputs_give_no_outputs():
    layer = nn.Linear(8, 16)
    packed = packed_copy(layer, quantize_weights(layer, Recipe(4)))
    assert packed(torch.zeros(0, 8)).shape == (0, 16)


def test_gradients_pass_where_they_are_asked_for(taken):
    layer = nn.Linear(8, 16)
    weights = quantize_weights(layer, Recipe(4, granularity="channel"))
    packed, plain = packed_copy(layer, weights), copy.deepcopy(layer)
    plain.load_state_dict(weights.state_dict())
    found = []
    for model in (packed, plain):
        x = torch.ones(2, 8, requires_grad=True)
        model(x).square().sum().backward()
        found.append(x.grad)
    assert taken == ["_by_floats"]
    assert torch.allclose(*found, atol=1e-5)


def test_other_precisions_and_traced_graphs_take_the_weight_itself(monkeypatch):
    layer = nn.Linear(8, 16)
    packed = packed_copy(layer, quantize_weights(layer, Recipe(4)))
    expected = packed(torch.ones(1, 8))
    monkeypatch.setattr(layers, "product", None)
    assert copy.deepcopy(packed).bfloat16()(torch.ones(1, 8).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(torch.ones(1, 8)).dtype == torch.bfloat16
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(torch.ones(1, 8)), expected, atol=1e-5)


def test_a_processor_whose_sums_are_wrong_computes_in_floats(monkeypatch, taken):
    products.whole_numbers_are_exact.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.int() @ b.int()).clamp(-32768, 32767))
    try:
        layer = nn.Linear(8, 16)
        weights = quantize_weights(layer, Recipe(4, granularity="channel"))
        found, exact = packed_and_exact(layer, weights, torch.randn(2, 8))
    finally:
        products.whole_numbers_are_exact.cache_clear()
    assert taken == ["_by_floats"]
    assert apart(found, exact) <= EXACT
