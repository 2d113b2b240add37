"""SparsifyWeights in real fits: exact zeros to the file, resumed, beside others, and what is refused."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import nn

from clipquant import (
    GradientClipCallback,
    QuantizationAwareTraining,
    QuantizeOnFitEnd,
    SparsifyWeights,
    load_quantized,
)
from clipquant.artifact import read_artifact

sys.path.insert(0, str(Path(__file__).parent))
from small_fit import QUIET, Small, fit, loader


class Momentum(Small):
    """Trained with momentum and decay, which move weights that have no gradient."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=0.01)


def zeros(model):
    return {n: int((p == 0).sum()) for n, p in model.state_dict().items() if p.dim() > 1}


def share(model):
    total = sum(p.numel() for p in model.state_dict().values() if p.dim() > 1)
    return sum(zeros(model).values()) / total


class Watch(Callback):
    """Notes the share of zeros that every forward pass sees."""

    def __init__(self):
        self.seen = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append(share(pl_module))


WAYS = {
    "global": {"final": 0.8},
    "layer": {"final": 0.8, "scope": "layer"},
    "movement": {"final": 0.8, "by": "movement"},
    "gradient": {"final": 0.8, "by": "gradient"},
    "linear": {"final": 0.8, "schedule": "linear"},
    "once": {"final": 0.8, "schedule": "once"},
    "2:4": {"pattern": "2:4"},
}


@pytest.mark.parametrize("way", WAYS)
def test_sparsity_grows_to_what_was_asked_and_zeros_stay(way, tmp_path):
    torch.manual_seed(0)
    watch, sparsify = Watch(), SparsifyWeights(**WAYS[way], start=0.2, stop=0.7)
    _, model = fit(sparsify, tmp_path, Momentum(), [watch], max_epochs=5)
    final = 0.5 if way == "2:4" else 0.8
    assert watch.seen[:4] == [0.0] * 4
    assert watch.seen == sorted(watch.seen)
    assert watch.seen[15:] == [watch.seen[-1]] * 5
    pruned = share(model) if way != "2:4" else zeros(model)["net.3.weight"] / 1440
    assert pruned == pytest.approx(final, abs=2e-3)
    if way == "once":
        assert watch.seen[5] == watch.seen[-1]
    if way == "layer":
        assert zeros(model) == {"net.0.weight": 29, "net.3.weight": 1152}
    assert sparsify.sparsity["net.3.weight"] == zeros(model)["net.3.weight"] / 1440


KEEP = {
    "8 bits": (QuantizeOnFitEnd(8), None),
    "4 bits": (QuantizeOnFitEnd(4, calibration_batches=2), None),
    "groups": (QuantizeOnFitEnd(4, granularity=16, method="hqq"), None),
    "ternary": (QuantizeOnFitEnd(), QuantizationAwareTraining(2, levels=2, start=0.3)),
    "2 bits": (QuantizeOnFitEnd(), QuantizationAwareTraining(2, start=0.8)),
    "3 bits": (QuantizeOnFitEnd(), QuantizationAwareTraining(3, start=0.0, distill=1.0)),
}


@pytest.mark.parametrize("way", KEEP)
@pytest.mark.parametrize("turned", [False, True])
def test_zeros_are_exact_in_the_file_and_each_layer_says_its_share(way, turned, tmp_path):
    quantizer, qat = KEEP[way]
    quantizer.dirpath = tmp_path / "quantized"
    sparsify = SparsifyWeights(0.75, stop=0.5)
    callbacks = [c for c in (qat, sparsify) if c is not None]
    torch.manual_seed(0)
    masks = {}

    class Note(Callback):
        def on_train_end(self, trainer, pl_module):
            masks.update({n: p.detach() == 0 for n, p in pl_module.named_parameters()})

    callbacks = [quantizer, *callbacks, Note()]
    trainer = pl.Trainer(
        callbacks=callbacks[::-1] if turned else callbacks, max_epochs=4, default_root_dir=tmp_path,
        enable_checkpointing=False, **QUIET,
    )  # fmt: skip
    model = Small()
    trainer.fit(model, loader(), loader())
    state = load_quantized(quantizer.artifact_path)
    assert quantizer.report.failures == ()
    for name in ("net.0.weight", "net.3.weight"):
        assert int(masks[name].sum()) > 0
        assert bool((state[name][masks[name]] == 0.0).all())
        assert torch.equal(model.state_dict()[name], state[name])
    tensors = read_artifact(quantizer.artifact_path).weights.tensors
    assert all(tensor.symmetric for tensor in tensors.values())
    for layer in quantizer.report.layers:
        least = float(masks[layer.name].float().mean())
        assert "zeros (" in layer.note
        said = float(layer.note.split("zeros (")[1].split("%")[0]) / 100
        assert said >= least - 1e-3


def test_a_resumed_fit_is_the_same_to_the_last_bit(tmp_path):
    for by in ("magnitude", "movement", "gradient"):
        for epoch in (1, 2):
            keeper = ModelCheckpoint(tmp_path / by, "{epoch}", save_top_k=-1)

            def fitted(*callbacks, ckpt_path=None, by=by):
                torch.manual_seed(0)
                model = Momentum()
                sparsify = SparsifyWeights(0.8, by=by, start=0.2, stop=0.8)
                trainer = pl.Trainer(
                    callbacks=[sparsify, QuantizationAwareTraining(3, start=0.6), *callbacks],
                    max_epochs=5, default_root_dir=tmp_path, enable_checkpointing=bool(callbacks),
                    **QUIET,
                )  # fmt: skip
                trainer.fit(model, loader(), loader(), ckpt_path=ckpt_path)
                return model

            whole = fitted(keeper)
            path = tmp_path / by / f"epoch={epoch}.ckpt"
            if not path.exists():
                path = tmp_path / by / f"epoch={epoch}-v1.ckpt"
            again = fitted(ckpt_path=path)
            assert share(whole) >= 0.79
            assert all(torch.equal(v, whole.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_checkpoint_has_plain_keys_and_masks_beside(tmp_path):
    keeper = ModelCheckpoint(tmp_path)
    fit(keeper, tmp_path, Small(), [SparsifyWeights(0.5, start=0.0, stop=0.2)],
        enable_checkpointing=True)  # fmt: skip
    checkpoint = torch.load(keeper.best_model_path, weights_only=True)
    assert checkpoint["state_dict"].keys() == Small().state_dict().keys()
    (state,) = (s for k, s in checkpoint["callbacks"].items() if "Sparsify" in k)
    assert sum(mask.nbytes for mask in state["masks"].values()) == (1440 + 36 + 7) // 8
    model = Small.load_from_checkpoint(keeper.best_model_path)
    assert share(model) == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"final": 0.7}, "final=0.5 there, and has final=0.7 now"),
        ({"final": 0.5, "by": "gradient"}, "by='magnitude' there"),
        ({"pattern": "2:4"}, "pattern=None there"),
    ],
)
def test_a_fit_that_goes_on_with_other_masks_is_refused(settings, said, tmp_path):
    keeper = ModelCheckpoint(tmp_path)
    fit(keeper, tmp_path, Small(), [SparsifyWeights(0.5, start=0.0, stop=0.2)],
        enable_checkpointing=True)  # fmt: skip
    trainer = pl.Trainer(callbacks=[SparsifyWeights(**settings)], max_epochs=3,
                         default_root_dir=tmp_path, **QUIET)  # fmt: skip
    with pytest.raises(ValueError, match=said):
        trainer.fit(Small(), loader(), loader(), ckpt_path=keeper.best_model_path)


class TwoSteps(Momentum):
    """Takes two steps a batch by hand; what each sees is noted."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.seen = []

    def training_step(self, batch, i):
        optimizer = self.optimizers()
        for _ in range(2):
            self.seen.append(share(self))
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, i))
            optimizer.step()


def test_zeros_hold_between_the_steps_of_one_batch(tmp_path):
    torch.manual_seed(0)
    _, model = fit(SparsifyWeights(0.5, start=0.0, stop=0.0), tmp_path, TwoSteps())
    assert min(model.seen[2:]) == share(model)
    assert share(model) == pytest.approx(0.5, abs=1e-2)


BESIDE = {
    "clipping": lambda: {"callbacks": [GradientClipCallback(0.01)]},
    "swa": lambda: {"callbacks": [StochasticWeightAveraging(0.01, swa_epoch_start=1)]},
    "ema": lambda: {"callbacks": [EMAWeightAveraging(decay=0.5)]},
    "bf16": lambda: {"precision": "bf16-true"},
    "accumulation": lambda: {"accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("beside", BESIDE)
def test_zeros_hold_beside_others(beside, tmp_path):
    arguments = BESIDE[beside]()
    callbacks = [SparsifyWeights(0.7, stop=0.6), *arguments.pop("callbacks", [])]
    quantizer = QuantizeOnFitEnd(4, dirpath=tmp_path / "quantized")
    _, model = fit(quantizer, tmp_path, Momentum(), callbacks, max_epochs=4, **arguments)
    assert share(model) >= 0.69
    state = load_quantized(quantizer.artifact_path)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_lightnings_own_pruning_keeps_working_and_its_zeros_too(tmp_path):
    quantizer = QuantizeOnFitEnd(4, dirpath=tmp_path / "quantized")
    pruning = ModelPruning("l1_unstructured", amount=0.5, parameters_to_prune=None)
    torch.manual_seed(0)
    _, model = fit(quantizer, tmp_path, Small(), [pruning])
    assert quantizer.report.failures == ()
    state = load_quantized(quantizer.artifact_path)
    assert zeros(model)["net.3.weight"] >= 600
    assert int((state["net.3.weight"] == 0).sum()) >= 600


def test_a_layer_is_never_pruned_whole_and_that_is_told_once(tmp_path):
    class Uneven(Small):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.net[0].weight.mul_(1e-6)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-9)

    with pytest.warns(UserWarning, match="would have pruned net.0.weight whole") as told:
        _, model = fit(SparsifyWeights(0.5), tmp_path, Uneven(), max_epochs=3)
    assert 0 < 36 - zeros(model)["net.0.weight"] <= 4
    assert sum("would have pruned" in str(w.message) for w in told) == 1


def test_a_fit_that_ends_before_its_start_prunes_nothing_and_says_so(tmp_path):
    stop = EarlyStopping("val_loss", patience=0, stopping_threshold=99.0)
    with pytest.warns(UserWarning, match="SparsifyWeights.*never began"):
        _, model = fit(SparsifyWeights(0.5, start=0.6), tmp_path, Small(), [stop], max_epochs=9)
    assert share(model) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"final": 0}, "above 0 and below 1; got 0"),
        ({"final": 1.0}, "nothing would be left"),
        ({"final": "90%"}, "final is the share"),
        ({"final": 0.5, "pattern": "2:4"}, "Give one of them"),
        ({"pattern": "4:2"}, "pattern must be 'N:M'"),
        ({"start": 0.8, "stop": 0.3}, "pruning ends after it has begun"),
        ({"start": 2}, "start is a share"),
        ({"schedule": "exponential"}, "schedule must be one of 'cubic', 'linear', 'once'"),
        ({"scope": "row"}, "scope must be one of 'global', 'layer'"),
        ({"by": "size"}, "by must be one of 'magnitude', 'movement', 'gradient'"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        SparsifyWeights(**arguments)


@pytest.mark.parametrize(
    ("callbacks", "arguments", "said"),
    [
        ([SparsifyWeights(0.5), QuantizationAwareTraining(1)], {}, "needs? a code of exactly zero"),
        (
            [SparsifyWeights(0.5), QuantizationAwareTraining(4, symmetric=False)],
            {},
            "symmetric=False, which has none",
        ),
        ([SparsifyWeights(0.5), ModelPruning("l1_unstructured", amount=0.5)], {}, "ModelPruning"),
        ([SparsifyWeights(0.5)], {"max_epochs": -1}, "whose length must be known"),
        ([SparsifyWeights(0.5, include=["nowhere"])], {}, "matches no parameter"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(callbacks, arguments, said, tmp_path):
    arguments = {"max_epochs": 1, "default_root_dir": tmp_path, **QUIET, **arguments}
    trainer = pl.Trainer(callbacks=callbacks, **arguments)
    with pytest.raises(ValueError, match=said):
        trainer.fit(Small(), loader(), loader())
    assert trainer.global_step == 0


def test_a_model_without_weights_to_prune_is_refused(tmp_path):
    model = Small()
    model.net = nn.Sequential(nn.Flatten(), nn.LayerNorm(64))
    with pytest.raises(ValueError, match="no weight to quantize"):
        fit(SparsifyWeights(0.5), tmp_path, model)


def test_another_librarys_keyword_is_told_by_its_name_here():
    with pytest.raises(TypeError, match=r"amount=0.5: give final=0.5"):
        SparsifyWeights(amount=0.5)
