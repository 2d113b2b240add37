import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from clipquant.export import Example, ExportError, Judgement, export_onnx_int8
from clipquant.export.bench import interleaved_medians
from clipquant.export.onnx import dequantized_copy
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe
from clipquant.reference import TwoConvNet


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.linear = nn.Linear(8 * 36, 16)
        self.last = nn.Linear(16, 4, bias=False)

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(1)
        return {"logits": self.last(torch.relu(self.linear(x))[:, None])[:, 0]}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small().eval()


def batches(n=4, side=8):
    torch.manual_seed(1)
    return [Example((torch.randn(8, 1, side, side),)) for _ in range(n)]


def stored(path):
    return {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}


def enough(forward):
    """A judge that takes the first calibration method."""
    return Judgement(0.0, {})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One export of the small model: its weights, file, record, and what the judge saw."""
    torch.manual_seed(0)
    model, seen = Small().eval(), []

    def judge(forward):
        seen.append(forward(batches()[0].args[0]))
        return Judgement(0.0, {})

    path = tmp_path_factory.mktemp("int8") / "a.onnx"
    weights = quantize_weights(model, Recipe(8))
    record = export_onnx_int8(
        model, weights, batches()[0], path, calibration=batches(), judge=judge, max_drop=1.0
    )
    return model, weights, path, record, seen


def test_codes_are_the_artifacts_where_it_holds_8_bits_symmetric(exported):
    _, weights, path, _, _ = exported
    found = {k: v for k, v in stored(path).items() if v.dtype == np.int8 and v.size > 8}
    for name, tensor in weights.tensors.items():
        codes = tensor.codes.numpy().astype(int) - 127
        shape = tensor.layout.shape
        forms = (
            [codes.reshape(shape), codes.reshape(shape).T]
            if len(shape) == 2
            else [codes.reshape(shape)]
        )
        assert any(np.array_equal(v, f) for v in found.values() for f in forms), name


def test_scales_that_leave_the_last_code_unused_are_kept_too(model, tmp_path):
    from dataclasses import replace

    weights = quantize_weights(model, Recipe(8))
    tensor = weights.tensors["conv.weight"]
    few = replace(tensor, coded=replace(tensor.coded, codes=tensor.codes.clamp(27, 227)))
    weights = replace(weights, tensors={**weights.tensors, "conv.weight": few})
    export_onnx_int8(
        model, weights, batches()[0], tmp_path / "a.onnx", calibration=batches(),
        judge=enough, max_drop=1.0,
    )  # fmt: skip
    codes = stored(tmp_path / "a.onnx")["conv.weight_quantized"]
    assert np.array_equal(codes.reshape(8, 9), few.codes.numpy().astype(int) - 127)


def test_activations_take_codes_whose_products_cannot_overflow(exported):
    arrays = stored(exported[2])
    low, high = (
        float(f(b.args[0] for b in batches()))
        for f in (lambda xs: min(x.min() for x in xs), lambda xs: max(x.max() for x in xs))
    )
    assert arrays["x_scale"] == pytest.approx((high - low) / 127, rel=1e-3)
    top = round(high / float(arrays["x_scale"])) + int(arrays["x_zero_point"])
    assert top in (126, 127, 128)


def test_the_first_method_within_the_drop_is_taken_and_named(model, tmp_path):
    drops = iter([0.5, 0.01])
    record = export_onnx_int8(
        model,
        quantize_weights(model, Recipe(8)),
        batches()[0],
        tmp_path / "a.onnx",
        calibration=batches(),
        judge=lambda forward: Judgement(next(drops), {"val_acc": 0.9}),
        max_drop=0.02,
    )
    assert record.notes[0] == "activation ranges by Percentile"
    assert record.metrics == {"val_acc": 0.9}


def test_without_a_drop_the_best_of_the_three_is_taken(model, tmp_path):
    drops = iter([0.03, 0.02, 0.01])
    record = export_onnx_int8(
        model,
        quantize_weights(model, Recipe(4)),
        batches()[0],
        tmp_path / "a.onnx",
        calibration=batches(),
        judge=lambda forward: Judgement(next(drops), {}),
    )
    assert record.notes[0] == "activation ranges by Entropy"
    assert "rounded to int8 again: conv.weight" in record.notes[1]


class Attention(nn.Module):
    """Self-attention between two linear layers that see three axes, of shared weights."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        h = self.linear(x)
        return self.linear(torch.softmax(h @ h.transpose(1, 2), 2) @ h)


def test_operators_without_weights_are_left_in_float_where_all_in_int8_lose_too_much(
    tmp_path, monkeypatch
):
    from clipquant.export import onnx_int8

    calibrated = []

    def counted(source, method, batches, real=onnx_int8.activation_ranges):
        calibrated.append(method)
        return real(source, method, batches)

    monkeypatch.setattr(onnx_int8, "activation_ranges", counted)
    torch.manual_seed(0)
    model = Attention().eval()
    drops = iter([0.5, 0.4, 0.3, 0.2, 0.01])
    calls = [Example((torch.randn(4, 5, 8),))]
    record = export_onnx_int8(
        model,
        quantize_weights(model, Recipe(8)),
        calls[0],
        tmp_path / "a.onnx",
        calibration=calls,
        judge=lambda forward: Judgement(next(drops), {}),
        max_drop=0.1,
    )
    assert record.notes[0] == "activation ranges by Percentile"
    assert calibrated == ["MinMax", "Percentile", "Entropy"]
    assert record.notes[1].startswith("only operators that hold weights compute in int8")
    graph = onnx.load(tmp_path / "a.onnx").graph
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    inputs = [
        (node.op_type, [made_by.get(name) for name in node.input])
        for node in graph.node
        if node.op_type in ("MatMul", "Softmax")
    ]
    in_int8 = [kinds == ["DequantizeLinear"] * 2 for kind, kinds in inputs if kind == "MatMul"]
    assert sorted(in_int8) == [False, False, True, True]
    assert [kinds for kind, kinds in inputs if kind == "Softmax"] == [["MatMul"]]
    codes = [i.dims for i in graph.initializer if i.data_type == onnx.TensorProto.INT8]
    assert [list(dims) for dims in codes if len(dims) == 2] == [[8, 8]]
    assert not any(node.metadata_props for node in graph.node)


def test_the_judge_sees_a_forward_of_the_models_own_form(exported):
    model, _, _, record, seen = exported
    expected = batches()[0].run(model)["logits"]
    assert seen[0]["logits"].shape == (8, 4)
    assert float((seen[0]["logits"] - expected).abs().max()) < 0.1 * float(expected.abs().max())
    assert {"threads", "batch 1, ratio", "batch 32, ratio"} <= set(record.latency)


def test_without_a_judge_the_best_by_distance_is_taken_and_that_is_said(model, tmp_path):
    record = export_onnx_int8(
        model, quantize_weights(model, Recipe(8)), batches()[0], tmp_path / "a.onnx",
        calibration=batches(), max_drop=1e9,
    )  # fmt: skip
    assert "judged by the distance of its outputs" in record.notes[-1]
    assert record.metrics == {}


def test_a_table_that_is_tied_to_a_decoder_takes_one_scale(zoo, ids, tmp_path):
    record = export_onnx_int8(
        zoo, quantize_weights(zoo, Recipe(8)), ids, tmp_path / "a.onnx", calibration=[ids],
        judge=enough, max_drop=1.0,
    )  # fmt: skip
    assert any("tables that are looked up" in n and "embedding.weight" in n for n in record.notes)
    outputs = ids.run(zoo)
    assert record.difference < 0.2 * max(float(t.abs().max()) for t in outputs.values())


@pytest.mark.parametrize("every_width", ["channel"], indirect=True)
def test_every_width_runs_in_int8(every_width, ids, tmp_path, monkeypatch, run_without):
    monkeypatch.setattr("clipquant.export.onnx_int8.CALIBRATION", ("MinMax",))
    model, weights = every_width
    ids = ids.map(lambda tensor: tensor % 11)
    record = export_onnx_int8(model, weights, ids, tmp_path / "a.onnx", calibration=[ids])
    rounded = next(note for note in record.notes if "rounded to int8 again" in note)
    again = set(rounded.split(": ")[1].split(", "))
    kinds = ("embedding", "conv", "linear")
    kept = {f"{kind}.8.weight" for kind in kinds[1:]}  # a table takes one scale
    assert again == {f"{kind}.{b}.weight" for kind in kinds for b in range(1, 9)} - kept
    codes = [a for a in stored(tmp_path / "a.onnx").values() if a.dtype in (np.int8, np.uint8)]
    assert sum(a.ndim > 1 for a in codes) == 24
    expected = ids.run(dequantized_copy(model, weights))
    np.savez(
        tmp_path / "a.npz", ids=ids.args[0].numpy(), **{k: v.numpy() for k, v in expected.items()}
    )
    found = run_without(
        f"""
import numpy as np, onnxruntime as ort
session, saved = ort.InferenceSession({str(tmp_path / "a.onnx")!r}), np.load({str(tmp_path / "a.npz")!r})
names = [output.name for output in session.get_outputs()]
for name, out in zip(names, session.run(names, {{"ids": saved["ids"]}})):
    print(name, float(abs(out - saved[name]).max() / abs(saved[name]).max()))
""",
        "clipquant",
        "torch",
    )
    errors = dict(line.split() for line in found.splitlines())
    assert errors.keys() == expected.keys()
    assert {name: error for name, error in errors.items() if float(error) > 0.03} == {}


def test_slower_than_float_is_said_plainly(model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "clipquant.export.onnx_int8.interleaved_medians", lambda calls: {"float": 1.0, "int8": 2.0}
    )
    record = export_onnx_int8(
        model, quantize_weights(model, Recipe(8)), batches()[0], tmp_path / "a.onnx",
        calibration=batches(), judge=enough, max_drop=1.0,
    )  # fmt: skip
    assert any(note.startswith("WARNING: int8 is slower than float here") for note in record.notes)
    assert record.latency["batch 1, ratio"] == 2.0


def test_batches_of_different_sizes_calibrate(model, tmp_path):
    short = [*batches(2), batches()[0].rows(0, 3)]
    record = export_onnx_int8(
        model,
        quantize_weights(model, Recipe(8)),
        short[0],
        tmp_path / "a.onnx",
        calibration=short,
    )
    assert record.difference < 0.1


def test_a_calibration_that_fails_is_told_and_another_taken(model, tmp_path, monkeypatch):
    from clipquant.export import onnx_int8

    def fails(source, method, batches, real=onnx_int8.activation_ranges):
        if method != "Percentile":
            raise ValueError(f"too many bins for {method}")
        return real(source, method, batches)

    monkeypatch.setattr(onnx_int8, "activation_ranges", fails)
    asked = {"calibration": batches(), "judge": enough, "max_drop": None}
    weights = quantize_weights(model, Recipe(8))
    record = export_onnx_int8(model, weights, batches()[0], tmp_path / "a.onnx", **asked)
    assert record.notes[0] == "activation ranges by Percentile"
    assert [
        f"{m} calibration failed: ValueError: too many bins for {m}" for m in ("MinMax", "Entropy")
    ] == [note for note in record.notes if "failed" in note]
    monkeypatch.setattr("clipquant.export.onnx_int8.CALIBRATION", ("MinMax",))
    with pytest.raises(ExportError, match=r"no calibration gave ranges: MinMax .* too many bins"):
        export_onnx_int8(model, weights, batches()[0], tmp_path / "b.onnx", **asked)


def test_no_calibration_data_is_refused(model, tmp_path):
    with pytest.raises(ExportError, match="needs calibration data"):
        export_onnx_int8(
            model,
            quantize_weights(model, Recipe(8)),
            batches()[0],
            tmp_path / "a",
            calibration=[],
        )


def test_the_reference_network_runs_in_numpy_alone(tmp_path, run_without):
    torch.manual_seed(0)
    model = TwoConvNet()
    x = batches(2, side=28)
    export_onnx_int8(
        model, quantize_weights(model, Recipe(8)), x[0], tmp_path / "a.onnx", calibration=x,
        judge=lambda forward: Judgement(0.0, {}), max_drop=0.0,
    )  # fmt: skip
    np.save(tmp_path / "x.npy", x[0].args[0].numpy())
    np.save(tmp_path / "y.npy", x[0].run(model.eval()).numpy())
    source = (
        "import numpy as np, onnxruntime as ort\n"
        f"folder = {str(tmp_path)!r}\n"
        "session = ort.InferenceSession(folder + '/a.onnx')\n"
        "y, expected = session.run(None, {'x': np.load(folder + '/x.npy')})[0], np.load(folder + '/y.npy')\n"
        "print(abs(y - expected).max() / abs(expected).max())\n"
    )
    assert float(run_without(source, "clipquant", "torch", "lightning")) < 0.1


def test_every_call_is_timed_as_often():
    counts = {"a": 0, "b": 0}

    def call(name):
        counts[name] += 1

    interleaved_medians({name: lambda name=name: call(name) for name in counts}, repeats=7)
    assert counts["a"] == counts["b"] >= 7


class Folded(nn.Module):
    """A convolution, plain or transposed, before a BatchNorm of very unequal scales, some of them negative."""

    def __init__(self, conv):
        super().__init__()
        self.conv, self.norm, self.last = conv, nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.norm.weight.data = torch.exp(torch.randn(8)) * torch.tensor([1, -1] * 4)
        self.norm.running_var.data = torch.exp(2 * torch.randn(8)) * 0.05

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.conv(x))))


@pytest.mark.parametrize("kind", ["plain", "depthwise", "transposed"])
def test_scales_follow_a_batchnorm_that_is_folded_into_a_weight(kind, tmp_path):
    torch.manual_seed(0)
    conv = {
        "plain": nn.Conv2d(8, 8, 3),
        "depthwise": nn.Conv2d(8, 8, 3, groups=8),
        "transposed": nn.ConvTranspose2d(8, 8, 3),
    }[kind]
    model = Folded(conv).eval()
    calls = [Example((torch.randn(8, 8, 9, 9),))]
    record = export_onnx_int8(
        model, quantize_weights(model, Recipe(8)), calls[0], tmp_path / "a.onnx", calibration=calls
    )
    assert record.difference < 0.1 * float(calls[0].run(model).abs().max())
    assert not any("rounded to int8 again" in note for note in record.notes)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, ids):
        return self.layer(self.table(ids), src_key_padding_mask=ids == 0).mean(1)


def test_masks_of_minus_infinity_stay_in_float_and_weighted_operators_do_not(tmp_path):
    torch.manual_seed(0)
    ids = torch.randint(1, 30, (8, 6))
    ids[:, 4:] = 0
    model, call = Masked().eval(), Example((ids,))
    record = export_onnx_int8(
        model, quantize_weights(model, Recipe(8)), call, tmp_path / "a.onnx", calibration=[call]
    )
    codes = [a for a in stored(tmp_path / "a.onnx").values() if a.dtype == np.int8 and a.ndim == 2]
    assert len(codes) >= 4
    assert not any("failed" in note for note in record.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_becomes_float32_and_that_is_said(dtype, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 8)).to(dtype)
    call = Example((torch.randn(4, 64).to(dtype),))
    seen = []

    def judge(forward):
        seen.append(forward(*call.args))
        return Judgement(0.0, {})

    weights = quantize_weights(model, Recipe(8))
    record = export_onnx_int8(
        model, weights, call, tmp_path / "a.onnx", calibration=[call], judge=judge, max_drop=0.0
    )
    name = str(dtype).removeprefix("torch.")
    assert (
        f"the model's {name} became float32: so are the file's inputs and outputs" in record.notes
    )
    assert seen[0].dtype == torch.float32
    assert model[0].weight.dtype == dtype


def test_a_kind_of_operator_that_cannot_be_quantized_stays_in_float_and_is_named(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3, groups=2)).eval()
    call = Example((torch.randn(4, 3, 8, 8),))
    record = export_onnx_int8(
        model, quantize_weights(model, Recipe(8)), call, tmp_path / "a.onnx", calibration=[call]
    )
    said = " ".join(record.notes)
    assert "ConvTranspose stays in float: onnxruntime cannot quantize it here" in said
    assert "weights that stay in float in this file: 1.weight" in said
    assert stored(tmp_path / "a.onnx")["0.weight_quantized"].dtype == np.int8


def test_a_collapse_is_an_error_and_leaves_no_file(model, tmp_path, monkeypatch):
    from clipquant.export import onnx_int8

    def far(plain, batches, forward):
        return 0.9

    monkeypatch.setattr(onnx_int8, "relative_error", far)
    asked = {"calibration": batches()}
    weights = quantize_weights(model, Recipe(8))
    with pytest.raises(ExportError, match=r"loses the outputs of Small: .* by 90% of their size"):
        export_onnx_int8(model, weights, batches()[0], tmp_path / "a.onnx", **asked)
    assert not (tmp_path / "a.onnx").exists()
    export_onnx_int8(
        model, weights, batches()[0], tmp_path / "a.onnx", **asked, judge=enough, max_drop=0.0
    )  # judged well by the metric itself


def test_activations_that_are_cut_above_stay_cut(tmp_path):
    """Codes that end beyond a ReLU6's 6 must not let larger values through."""
    model = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False), nn.ReLU6(), nn.Conv1d(1, 1, 1)).eval()
    for layer in (model[0], model[2]):
        nn.init.ones_(layer.weight)
    call = Example((torch.linspace(-10, 10, 32).reshape(4, 1, 8),))
    record = export_onnx_int8(
        model, quantize_weights(model, Recipe(8)), call, tmp_path / "a.onnx", calibration=[call]
    )
    assert record.difference <= 0.2
    kinds = [node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node]
    assert "QuantizeLinear" in kinds


def test_what_is_no_tensor_among_outputs_comes_back_from_the_runner(tmp_path):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return {"logits": self.linear(x), "classes": 8, "rest": None}

    call, seen = Example((torch.randn(4, 8),)), []

    def judge(forward):
        seen.append(forward(*call.args))
        return Judgement(0.0, {})

    model = Counts()
    export_onnx_int8(
        model, quantize_weights(model, Recipe(8)), call, tmp_path / "a.onnx", calibration=[call],
        judge=judge, max_drop=0.0,
    )  # fmt: skip
    assert seen[0]["classes"] == 8
    assert seen[0]["logits"].shape == (4, 8)
    assert [o.name for o in onnx.load(tmp_path / "a.onnx").graph.output] == ["logits"]
