"""Distillation: nearer to what is wanted than its start or left out, whatever the network; nothing else moves."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from clipquant import QuantizeOnFitEnd, TwoConvNet, load_quantized, quantize
from clipquant.errors import ArgumentError
from clipquant.quant.codes.tensor import dequantize
from clipquant.quant.methods import Auto, Distill, Mse, Rtn
from clipquant.quant.network.calibration import Calibration, call_model
from clipquant.quant.network.outputs import distance, tensors_of
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe
from clipquant.reference import RandomDigit


class Tied(nn.Module):
    """An embedding and a decoder that share a weight, and a normalization between them."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.layer = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.decoder = nn.Linear(16, 20, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        return {"logits": self.decoder(self.norm(x + torch.tanh(self.layer(x))))}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(6, 12, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


def made(kind):
    torch.manual_seed(0)
    return kind().eval()


def mlp():
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 6))


def normalized():
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )
    with torch.no_grad():
        net.train()
        net(torch.randn(64, 2, 8, 8))
    return net


def ids(count):
    torch.manual_seed(1)
    return [torch.randint(0, 20, (32, 5)) for _ in range(count)]


def inputs(*shape):
    def batches(count):
        torch.manual_seed(1)
        return [torch.randn(shape).cumsum(-1) for _ in range(count)]  # neighbours are alike

    return batches


KINDS = {
    "mlp": (mlp, inputs(64, 12)),
    "tied": (Tied, ids),
    "recurrent": (Recurrent, inputs(32, 5, 6)),
    "transformer": (Transformer, inputs(32, 5, 8)),
    "batchnorm": (normalized, inputs(16, 2, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), inputs(16, 4, 9)),
}
QUICK = {"steps": 60, "start": Mse()}


def distilled(model, batches, bits=2, spec=None, **knobs):
    recipe = Recipe(bits, method=Distill(**{**QUICK, **knobs}), **(spec or {}))
    return quantize_weights(model, recipe, Calibration(batches))


def apart(model, weights, batches, want=None):
    """Return the mean distance of the outputs that some weights give from the float network's."""
    other = copy.deepcopy(model)
    other.load_state_dict(weights.state_dict())
    other.eval()
    with torch.no_grad():
        parts = [
            distance(
                list(tensors_of(call_model(other, b))),
                list(tensors_of(call_model(want or model, b))),
            )
            for b in batches
        ]
    return float(torch.stack(parts).mean())


def same(first, second):
    assert all(
        torch.equal(dequantize(t), dequantize(second.tensors[n])) for n, t in first.tensors.items()
    )
    assert all(torch.equal(v, second.floats[n]) for n, v in first.floats.items())


@pytest.mark.parametrize("kind", KINDS)
def test_batches_never_seen_come_out_nearer_than_from_its_start(kind):
    build, batches = KINDS[kind]
    model, data = made(build), batches(16)
    start = quantize_weights(model, Recipe(2, method="mse"), Calibration(data[:12]))
    weights = distilled(model, data[:12])
    assert {t.method for t in weights.tensors.values()} == {"distill"}
    assert all("distilled: loss" in note for note in weights.notes.values())
    assert apart(model, weights, data[12:]) < 0.95 * apart(model, start, data[12:])


@pytest.mark.parametrize(
    ("bits", "spec"),
    [
        (1, {}),
        (2, {"symmetric": True}),
        (3, {"granularity": 5}),
        (4, {"granularity": "tensor"}),
        (4, {"levels": 8}),
        (8, {}),
    ],
)
def test_every_grid_asked_for_is_kept_and_none_ends_further_off(bits, spec):
    build, batches = KINDS["mlp"]
    model, data = made(build), batches(8)
    start = quantize_weights(model, Recipe(bits, method="mse", **spec), Calibration(data))
    weights = distilled(model, data, bits, spec)
    for name, tensor in weights.tensors.items():
        first = start.tensors[name]
        assert (tensor.levels, tensor.group_size, tensor.bits) == (
            first.levels,
            first.group_size,
            first.bits,
        )
        assert tensor.scale.shape == first.scale.shape
        assert (tensor.zero is None) == (first.zero is None)
        assert tensor.codes.max() <= tensor.levels
    held = [data[n] for n in Calibration(data).apart]
    assert apart(model, weights, held) <= apart(model, start, held) * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["mlp", "tied", "batchnorm"])
def test_two_runs_are_equal_to_the_bit_and_the_model_and_random_state_are_as_before(kind):
    build, batches = KINDS[kind]
    model, data = made(build).train(), batches(6)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = distilled(model, data, steps=12)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    same(first, distilled(model, data, steps=12))
    assert all(part.training for part in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    other = distilled(model, data, steps=12, seed=1)
    assert any(
        not torch.equal(dequantize(t), dequantize(other.tensors[n]))
        for n, t in first.tensors.items()
    )


def test_a_recurrent_layers_weights_are_learned_as_the_others():
    build, batches = KINDS["recurrent"]
    model, data = made(build), batches(8)
    start = quantize_weights(model, Recipe(2, method="mse"), Calibration(data))
    weights = distilled(model, data)
    moved = [
        n for n, t in weights.tensors.items() if not torch.equal(t.scale, start.tensors[n].scale)
    ]
    assert set(moved) == set(weights.tensors)


def test_tied_weights_stay_tied_and_normalizations_move():
    build, batches = KINDS["tied"]
    model = made(build)
    weights = distilled(model, batches(8))
    assert weights.aliases == {"decoder.weight": "embedding.weight"}
    state = weights.state_dict()
    assert torch.equal(state["decoder.weight"], state["embedding.weight"])
    for name in ("norm.weight", "norm.bias", "layer.bias"):
        assert not torch.equal(state[name], model.state_dict()[name])


def test_statistics_of_normalization_are_frozen_while_it_learns():
    build, batches = KINDS["batchnorm"]
    model, data = made(build), batches(8)
    before = copy.deepcopy(model.state_dict())
    weights = distilled(model, data)
    assert torch.equal(weights.floats["1.num_batches_tracked"], before["1.num_batches_tracked"])
    assert not torch.equal(weights.floats["1.weight"], before["1.weight"])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Breaking(nn.Module):
    """Outputs that are NaN where gradients are on, from one call on: as a loss that overflows in training."""

    def __init__(self, after, value):
        super().__init__()
        self.body, self.calls = mlp(), 0
        self.after, self.value = after, value

    def forward(self, x):
        self.calls += torch.is_grad_enabled()
        return self.body(x) * (self.value if self.calls > self.after else 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("after", [0, 7])
def test_a_loss_that_is_not_finite_leaves_the_rounded_weights_and_says_so(value, after):
    torch.manual_seed(0)
    model, data = Breaking(after, value).eval(), KINDS["mlp"][1](6)
    weights = distilled(model, data)
    model.calls = 0
    same(weights, quantize_weights(model, Recipe(2, method="mse"), Calibration(data)))
    for name, tensor in weights.tensors.items():
        assert tensor.method == "mse"
        assert (
            f"left out: its loss or a gradient was NaN or infinite at step {after + 1}"
            in (weights.notes[name])
        )


def test_a_gradient_that_is_not_finite_does_so_too():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            out = self.body(x)
            return out + torch.sqrt((out - out.detach()).abs())  # 0, with a slope that is NaN

    torch.manual_seed(0)
    weights = distilled(Steep().eval(), KINDS["mlp"][1](6))
    assert all("NaN or infinite at step 1" in note for note in weights.notes.values())


def test_what_ends_further_off_is_left_out_and_said():
    model, data = made(mlp), KINDS["mlp"][1](8)
    weights = distilled(model, data, bits=8, rate=30.0, steps=5)
    same(weights, quantize_weights(model, Recipe(8, method="mse"), Calibration(data)))
    assert all("distillation left out: loss" in note for note in weights.notes.values())


def test_it_stops_when_its_own_loss_falls_no_more_and_when_its_time_is_up():
    model, data = made(mlp), KINDS["mlp"][1](8)
    weights = distilled(model, data, rate=1e-9, steps=500, patience=2)
    # Six batches a pass: the first sets the mark, two more do not fall below it.
    assert all("18 steps, when it fell no more" in note for note in weights.notes.values())
    weights = distilled(model, data[:1], steps=10**6, patience=10**6)
    assert all(" 50 steps," in note for note in weights.notes.values())
    weights = distilled(model, data, steps=10**6, seconds=0.05)
    assert all("when its 0.05 seconds were up" in note for note in weights.notes.values())


def test_a_teacher_of_another_build_is_followed_and_left_as_it_is():
    model, data = made(mlp), KINDS["mlp"][1](12)
    torch.manual_seed(5)
    teacher = nn.Sequential(
        nn.Linear(12, 48), nn.BatchNorm1d(48), nn.Tanh(), nn.Dropout(), nn.Linear(48, 6)
    )
    before = copy.deepcopy(teacher.state_dict())
    weights = distilled(model, data, bits=4, teacher=teacher, steps=300, rate=0.1)
    plain = quantize_weights(model, Recipe(4, method="mse"), Calibration(data))
    assert all(part.training for part in teacher.modules())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    want = copy.deepcopy(teacher).eval()
    assert apart(model, weights, data, want) < 0.7 * apart(model, plain, data, want)


def test_a_teacher_of_another_output_shape_is_refused_before_anything_is_run():
    class Unused:
        name, needs_data = "unused", True

        def solve(self, problem):
            raise AssertionError("the start was looked for before the teacher was checked")

    model, data = made(mlp), KINDS["mlp"][1](4)
    with pytest.raises(ArgumentError, match=r"shapes, \[\(64, 6\)\].*got \[\(64, 7\)\] of Linear"):
        distilled(model, data, teacher=nn.Linear(12, 7), start=Unused())
    recipe = Recipe(2, method=Distill(teacher=mlp()))
    parts = Calibration(data, lambda m, x: m[2](m[1](m[0](x))))
    with pytest.raises(ArgumentError, match="never called"):
        quantize_weights(model, recipe, parts)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"steps": 0}, "steps must be a whole number, 1 or more; got 0"),
        ({"steps": True}, "steps must be"),
        ({"patience": 1.5}, "patience must be"),
        ({"rate": -1}, "rate must be a number above 0; got -1"),
        ({"rate": math.nan}, "rate must be"),
        ({"seconds": 0}, "seconds must be a number above 0; got 0"),
        ({"seed": -1}, "seed must be"),
        ({"loss": "l1"}, "loss must be one of 'auto', 'kl', 'mse'; got 'l1'"),
        ({"teacher": 18}, "teacher must be a module"),
        ({"labels": 1}, "labels must be True or False; got 1"),
    ],
)
def test_a_knob_that_cannot_be_is_refused(knobs, said):
    with pytest.raises(ArgumentError, match=said):
        Distill(**knobs)


def test_no_label_is_read_and_few_batches_will_do():
    model, data = made(mlp), KINDS["mlp"][1](2)
    labels = [torch.zeros(64).long(), torch.ones(64).long()]
    first = quantize(model, 2, method=Distill(**QUICK), data=list(zip(data, labels, strict=True)))
    second = quantize(model, 2, method=Distill(**QUICK), data=data)
    same(first.weights, second.weights)
    assert all("too few to hold any apart" in note for note in first.weights.notes.values())
    with pytest.raises(ValueError, match="method='distill' calibrates on data; got none"):
        quantize(model, 2, method="distill")


def test_what_is_left_out_stays_in_float_and_what_is_fixed_is_followed():
    model, data = made(mlp), KINDS["mlp"][1](8)
    weights = distilled(model, data, spec={"exclude": ["0.weight"]}, start=Rtn())
    assert set(weights.tensors) == {"2.weight"}
    assert torch.equal(weights.floats["0.weight"], model[0].weight)
    assert not torch.equal(weights.floats["0.bias"], model[0].bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = made(mlp).to(dtype)
    data = [batch.to(dtype) for batch in KINDS["mlp"][1](8)]
    start = quantize_weights(model, Recipe(2, method="mse"), Calibration(data))
    weights = distilled(model, data)
    assert {v.dtype for v in weights.state_dict().values()} == {dtype}
    assert apart(model, weights, data) < apart(model, start, data)


@pytest.mark.parametrize("teacher", [None, TwoConvNet()])
def test_in_a_fit_the_batches_are_the_trainers_and_the_file_is_what_was_learned(tmp_path, teacher):
    method = Distill(steps=4, rate=0.01, start=Mse(), teacher=teacher)
    callback = QuantizeOnFitEnd(
        2, method=method, calibration_batches=4, dirpath=tmp_path, on_fail="raise"
    )
    trainer = pl.Trainer(
        max_steps=2,
        limit_val_batches=1,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    pl.seed_everything(0, verbose=False)
    model = TwoConvNet()
    trainer.fit(model, RandomDigit())
    assert {layer.method for layer in callback.report.layers} <= {"distill", "mse"}
    assert all(
        "loss" in layer.note and "held apart" in layer.note for layer in callback.report.layers
    )
    state = load_quantized(callback.artifact_path)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Judged(nn.Module):
    """Gives a loss by labels beside its outputs, and the labels say the contrary of its outputs."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        out = self.body(x)
        return {"out": out, "loss": nn.functional.cross_entropy(out, self.labels(x))}

    def labels(self, x):
        return (x.sum(1) > 0).long()


def test_labels_draw_the_networks_own_loss_down():
    model, data = made(Judged), KINDS["mlp"][1](12)
    losses = {}
    for labels in (False, True):
        weights = distilled(model, data, bits=3, steps=300, rate=0.05, labels=labels)
        pupil = copy.deepcopy(model)
        pupil.load_state_dict(weights.state_dict())
        losses[labels] = sum(float(pupil(x)["loss"].detach()) for x in data) / len(data)
    assert losses[True] < 0.9 * losses[False]
    # What running the model returns counts too, where it is no output of its own.
    plain = made(mlp)

    def step(m, x):
        return nn.functional.cross_entropy(m(x), (x.sum(1) > 0).long())

    recipe = Recipe(3, method=Distill(start=Mse(), labels=True, steps=300, rate=0.05))
    state = quantize_weights(plain, recipe, Calibration(data, step)).state_dict()
    before = sum(float(step(plain, x).detach()) for x in data)
    plain.load_state_dict(state)
    assert sum(float(step(plain, x).detach()) for x in data) < before


def test_labels_without_a_loss_are_refused():
    with pytest.raises(ArgumentError, match="labels=True trains on the module's own loss too"):
        distilled(made(mlp), KINDS["mlp"][1](4), labels=True)


def test_a_teacher_is_read_from_a_checkpoint(tmp_path):
    model, data = made(mlp), KINDS["mlp"][1](12)
    torch.manual_seed(3)
    teacher = mlp()
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    found = [
        quantize(model, 4, data=data, method=Distill(start=Mse(), steps=20, teacher=one)).weights
        for one in (teacher, str(tmp_path / "teacher.pt"), tmp_path / "teacher.pt")
    ]
    same(found[0], found[1])
    same(found[0], found[2])
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ArgumentError, match="teacher must be a checkpoint of a Sequential"):
        quantize(model, 4, data=data, method=Distill(teacher=tmp_path / "other.pt"))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        quantize(model, 4, data=data, method=Distill(teacher=tmp_path / "none.pt"))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        QuantizeOnFitEnd(2, method=Distill(teacher="none.pt"))


def test_a_lightning_checkpoint_of_another_size_teaches(tmp_path):
    wide = TwoConvNet(num_classes=10)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(wide)
    trainer.save_checkpoint(tmp_path / "wide.ckpt")
    model = TwoConvNet()
    data = [torch.randn(2, 1, 28, 28) for _ in range(2)]
    method = Distill(start=Mse(), steps=1, teacher=tmp_path / "wide.ckpt")
    made = quantize(model, 2, data=data, method=method)
    assert len(made.weights.tensors) == 4


def test_auto_distills_at_two_bits_and_not_above():
    model, data = made(mlp), KINDS["mlp"][1](8)
    for bits, expected in ((1, True), (2, True), (3, False)):
        weights = quantize_weights(model, Recipe(bits), Calibration(data))
        tried = all("distill" in weights.notes.get(name, "") for name in weights.tensors)
        assert tried is expected
    free = quantize_weights(model, Recipe(1, method=Auto(distilled=0)), Calibration(data))
    near = quantize_weights(model, Recipe(1), Calibration(data))
    held = [data[n] for n in Calibration(data).apart]
    assert apart(model, near, held) < apart(model, free, held)
    assert {t.method for t in quantize_weights(model, Recipe(2)).tensors.values()} == {"mse"}
