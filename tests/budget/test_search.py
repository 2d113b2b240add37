"""Budgets through `quantize` and `QuantizeOnFitEnd`: the promise is about the file on disk."""

from __future__ import annotations

import copy
import math
import re
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from clipquant import QuantizeOnFitEnd, load_quantized, quantize
from clipquant.budget import BudgetError, size_in_bytes


@pytest.fixture(scope="module")
def problem() -> Any:
    torch.manual_seed(0)
    x = torch.randn(1200, 40)
    y = (x @ torch.randn(40, 6)).argmax(1)
    model = nn.Sequential(nn.Linear(40, 96), nn.ReLU(), nn.Linear(96, 6))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    def score(m: nn.Module) -> float:
        return float((m(x).argmax(1) == y).float().mean())

    return model.eval(), list(x.split(100)), score


@pytest.mark.parametrize("size", [5200, 6000, "5.5 kB", 0.3])
def test_a_size_budget_is_filled_and_never_passed(problem: Any, size: Any, tmp_path: Path) -> None:
    model, data, score = problem
    made = quantize(model, "auto", max_size=size, data=data, score=score)
    path = made.save(tmp_path / "m.safetensors")
    limit = size_in_bytes(size, made.report.float_bytes)
    assert limit - 1500 <= path.stat().st_size == made.report.size_bytes <= limit
    fresh = load_quantized(path, copy.deepcopy(model))
    assert score(fresh) == made.report.quantized_metrics["score"]
    assert made.report.budget.met


def test_a_drop_budget_holds_at_less_than_one_width_would_take(
    problem: Any, tmp_path: Path
) -> None:
    model, data, score = problem
    before = {n: t.clone() for n, t in model.state_dict().items()}
    made = quantize(model, "auto", max_drop=0.01, data=data, score=score)
    path = made.save(tmp_path / "m.safetensors")
    assert score(model) - score(load_quantized(path, copy.deepcopy(model))) <= 0.01
    assert len(made.report.budget.trials) <= 10
    assert [t.chosen for t in made.report.budget.trials].count(True) == 1
    widths = [quantize(model, b) for b in range(1, 9)]
    hold = [w for w in widths if score(model) - score(w.apply_to(copy.deepcopy(model))) <= 0.01]
    assert sum(layer.bytes for layer in made.report.layers) < sum(
        x.bytes for x in hold[0].report.layers
    )
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    again = quantize(model, "auto", max_drop=0.01, data=data, score=score)
    assert again.save(tmp_path / "n.safetensors").read_bytes() == path.read_bytes()


def test_both_and_irreconcilable_obeys_the_drop_and_says_what_it_needs(problem: Any) -> None:
    model, data, score = problem
    made = quantize(model, "auto", max_drop=0.0, max_size=3100, data=data, score=score)
    assert made.report.drop <= 0.0
    assert "needs" in made.report.budget.failure
    assert "max_size=3,100" in made.report.budget.failure
    both = quantize(model, "auto", max_drop=0.05, max_size=9000, data=data, score=score)
    assert both.report.budget.met
    assert both.report.size_bytes <= 9000
    assert len(both.report.budget.trials) == 1


def test_bad_budgets_are_told_with_the_remedy(problem: Any) -> None:
    model, data, score = problem
    for wrong in (-0.1, math.nan, math.inf, True, "1"):
        with pytest.raises(ValueError, match="max_drop must be a finite number"):
            quantize(model, "auto", max_drop=wrong, data=data)  # type: ignore[arg-type]
    for size in (0, -5, "lots", "300 bananas", 1.5, True, "0kB"):
        with pytest.raises(ValueError, match="max_size must be"):
            quantize(model, "auto", max_size=size, data=data)
    with pytest.raises(BudgetError, match=r"below the smallest possible file, \d,\d+ bytes"):
        quantize(model, "auto", max_size=100, data=data)
    with pytest.raises(BudgetError, match="judged on validation data"):
        quantize(model, "auto", max_drop=0.1, data=data)
    with pytest.raises(BudgetError, match="score is NaN"):
        quantize(model, "auto", max_drop=0.1, data=data, score=lambda m: math.nan)
    with pytest.raises(ValueError, match="data=None"):
        quantize(model, "auto", max_size=9000)
    with pytest.raises(ValueError, match="need bits='auto'"):
        quantize(model, 4, max_size=9000)
    with pytest.raises(ValueError, match="granularity='tensor'"):
        quantize(model, "auto", max_size=9000, data=data, granularity="tensor")


@pytest.mark.parametrize(("lucky", "chosen"), [(1, "rows"), (4, "rows"), (60, "uniform")])
def test_a_size_is_filled_by_rows_unless_one_width_is_better_beyond_chance(
    problem: Any, lucky: int, chosen: str
) -> None:
    model, data, _ = problem
    calls: list[int] = []

    def right(_m: nn.Module) -> torch.Tensor:
        """The float network's, then rows', then one width's: a few of 500 right by luck."""
        calls.append(400 + (lucky if len(calls) == 2 else 0))
        return torch.arange(500) < calls[-1]

    made = quantize(model, "auto", max_size=4500, data=data, score=right, progress=False)
    assert [t.what for t in made.report.budget.trials if t.chosen] == [chosen]
    full, uniform, *curve = made.report.budget.trials
    assert [full.chosen, uniform.chosen] == [chosen == "rows", chosen == "uniform"]
    assert not any(t.chosen for t in curve)


def test_a_figure_for_each_sample_gives_the_drop_its_error(problem: Any) -> None:
    model, data, score = problem
    x = torch.cat(data)
    y = model(x).argmax(1)

    def right(m: nn.Module) -> torch.Tensor:
        return m(x).argmax(1) == y

    asked: dict[str, Any] = {"max_drop": 0.01, "data": data, "progress": False}
    sure = quantize(model, "auto", score=right, confidence=0.99, **asked).report
    plain = quantize(model, "auto", score=right, **asked).report
    alone = quantize(model, "auto", score=lambda m: float(right(m).float().mean()), **asked).report
    assert sure.bits_per_weight > plain.bits_per_weight > alone.bits_per_weight
    assert sure.budget.sure > 0.99 > plain.budget.sure > 0.84
    assert sure.drop + 2 * sure.drop_error < 0.01
    assert "% sure" in plain.verdict
    assert f"+- {plain.drop_error:.2g}"[:6] in plain.verdict
    assert alone.budget.sure is None
    assert alone.drop_error is None
    assert "one figure" in alone.budget.unsure
    assert any("kept by the drop measured" in worry for worry in alone.worries)


def test_confidence_goes_with_a_drop_alone(problem: Any, tmp_path: Path) -> None:
    model, data, _ = problem
    with pytest.raises(ValueError, match=r"above 0\.5 and below 1, such as 0\.95; got 95"):
        quantize(model, "auto", max_drop=0.1, data=data, confidence=95)
    with pytest.raises(ValueError, match="without max_drop"):
        QuantizeOnFitEnd("auto", max_size=0.1, confidence=0.9)
    for door in (QuantizeOnFitEnd, lambda *a, **k: quantize(model, *a, **k)):
        with pytest.raises(ValueError, match=r"got bits=4 with confidence=0\.9"):
            door(4, confidence=0.9)


class Lit(pl.LightningModule):
    """The network of the problem; logs under two names."""

    def __init__(self, model: nn.Module, steps: bool = True) -> None:
        super().__init__()
        self.model, self.steps = copy.deepcopy(model), steps

    def forward(self, x: Any) -> Any:
        return self.model(x)

    def training_step(self, batch: Any, index: int) -> Any:
        if not self.steps:
            assert self.trainer.training
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), sync_dist=True)
        self.log("depth", float(self.trainer.max_epochs or 0))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-4)


def fit(
    problem: Any, callback: QuantizeOnFitEnd, tmp_path: Path, val: bool = True, **kwargs: Any
) -> Any:
    model, data, _ = problem
    x = torch.cat(data)
    loader = DataLoader(TensorDataset(x, model(x).argmax(1)), 100)
    module = Lit(model, kwargs.pop("steps", True))
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **kwargs,
    )  # fmt: skip
    trainer.fit(module, loader, loader if val else None)
    return module


@pytest.mark.parametrize("steps", [True, False])
def test_the_callback_keeps_both_budgets(problem: Any, tmp_path: Path, steps: bool) -> None:
    callback = QuantizeOnFitEnd(
        "auto", max_drop=0.03, max_size=8000, monitor="acc", mode="max", dirpath=tmp_path
    )
    module = fit(problem, callback, tmp_path, steps=steps)
    report = callback.report
    assert report is not None
    assert report.budget is not None
    assert report.budget.met
    assert (tmp_path / "model.safetensors").stat().st_size == report.size_bytes <= 8000
    assert report.drop is not None
    assert report.drop <= 0.03
    assert report.drop_error is not None
    assert report.drop + report.drop_error <= 0.03
    assert report.budget.sure is not None
    assert report.budget.sure > 0.84
    assert report.budget.trials[0].error == report.drop_error
    state = load_quantized(tmp_path / "model.safetensors")
    assert all(torch.equal(t, state[n]) for n, t in module.state_dict().items())  # type: ignore[index]
    assert ("loss of training_step" if steps else "divergence of the outputs") in report.calibration
    assert all(layer.sensitivity is not None for layer in report.layers)
    assert "The search for the budget" in (tmp_path / "report.html").read_text()


def test_a_missed_budget_warns_or_raises(problem: Any, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"max_drop": 0.0, "max_size": 3100, "monitor": "acc", "mode": "max"}
    warned = QuantizeOnFitEnd("auto", dirpath=tmp_path, **asked)
    with pytest.warns(UserWarning, match="Budget missed"):
        fit(problem, warned, tmp_path)
    assert warned.report is not None
    assert not warned.report.budget.met
    with pytest.raises(BudgetError, match=r"What comes nearest is in .*no/model\.safetensors"):
        fit(
            problem,
            QuantizeOnFitEnd("auto", dirpath=tmp_path / "no", on_fail="raise", **asked),
            tmp_path,
        )
    assert load_quantized(tmp_path / "no" / "model.safetensors")


def test_what_cannot_be_judged_is_refused_before_training(problem: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="'val_loss', which validation does not log; logged are acc, depth"
    ):
        fit(problem, QuantizeOnFitEnd("auto", max_drop=0.1, dirpath=tmp_path), tmp_path)
    with pytest.raises(ValueError, match="the Trainer has none"):
        fit(problem, QuantizeOnFitEnd("auto", max_drop=0.1, dirpath=tmp_path), tmp_path, val=False)
    late = QuantizeOnFitEnd("auto", max_drop=0.1, dirpath=tmp_path)
    with pytest.warns(UserWarning, match="never logged in validation; logged were acc, depth"):
        fit(problem, late, tmp_path, num_sanity_val_steps=0)
    assert late.report is not None
    assert [layer.bits for layer in late.report.layers] == [8.0] * len(late.report.layers)
    assert not late.report.budget.met  # type: ignore[union-attr]
    sized = QuantizeOnFitEnd("auto", max_size=7000, dirpath=tmp_path)
    fit(problem, sized, tmp_path, val=False)
    assert sized.report is not None
    assert sized.report.size_bytes <= 7000


class Awkward(Lit):
    """Batches are dicts, validation loaders are two and a lock keeps the module from being copied."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.lock = threading.Lock()
        self.trained = 0

    def training_step(self, batch: Any, index: int) -> Any:
        self.trained += 1
        return F.cross_entropy(self(batch["x"]), batch["y"])

    def validation_step(self, batch: Any, index: int, dataloader_idx: int) -> None:
        right = (self(batch["x"]).argmax(1) == batch["y"]).float().mean()
        self.log("acc", right, sync_dist=True, prog_bar=True)


def collate(pairs: Any) -> Any:
    return {
        "x": torch.stack([x for x, _ in pairs]),
        "y": torch.stack([y for _, y in pairs]),
    }


def awkward_fit(problem: Any, callback: QuantizeOnFitEnd, tmp_path: Path, **kwargs: Any) -> Any:
    model, data, _ = problem
    x = torch.cat(data)
    rows = TensorDataset(x, model(x).argmax(1))
    loader = DataLoader(rows, 100, collate_fn=collate)
    module = Awkward(model)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, **kwargs,
    )  # fmt: skip
    trainer.callbacks.append(callback)
    trainer.fit(module, loader, [loader, loader])
    return trainer, module


def test_custom_batches_and_a_module_that_cannot_be_copied(problem: Any, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", monitor="acc/dataloader_idx_1", mode="max")
    logger = CSVLogger(tmp_path, "logs")
    callback = QuantizeOnFitEnd("auto", max_size=6500, dirpath=tmp_path)
    trainer, module = awkward_fit(
        problem, callback, tmp_path, callbacks=[checkpoint], logger=logger
    )
    assert module.trained == trainer.global_step  # what runs aside is put back
    report = callback.report
    assert report is not None
    assert (report.monitor, report.mode) == ("acc/dataloader_idx_1", "max")
    assert report.budget is not None
    assert report.budget.met
    assert {layer.method for layer in report.layers} == {"gptq"}
    assert "loss of training_step" in report.calibration
    assert module.trainer is trainer
    assert "log" not in vars(module)
    state = load_quantized(tmp_path / "model.safetensors")
    assert all(torch.equal(t, state[n]) for n, t in module.state_dict().items())
    assert len(list((tmp_path / "ckpt").iterdir())) == 1
    logged = set(Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0].split(","))
    own = {"acc/dataloader_idx_0", "acc/dataloader_idx_1", "epoch", "step"}
    assert {key for key in logged if not key.startswith("quantized/")} <= own
    assert {"quantized/acc/dataloader_idx_1", "quantized/size_bytes"} <= logged


def test_a_size_that_no_file_can_have_is_told_before_training(problem: Any, tmp_path: Path) -> None:
    callback = QuantizeOnFitEnd("auto", max_size=900, dirpath=tmp_path)
    module = Awkward(problem[0])
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(torch.zeros(4, 40), torch.zeros(4).long()))
    with pytest.raises(
        BudgetError, match=r"below the smallest possible file, \d,\d+ bytes"
    ) as told:
        trainer.fit(module, loader)
    assert module.trained == 0
    said = int(re.findall(r"file, ([\d,]+) bytes", str(told.value))[0].replace(",", ""))
    model, data, _ = problem
    with pytest.raises(BudgetError, match="below the smallest"):
        quantize(model, "auto", max_size=said - 300, data=data)
    made = quantize(model, "auto", max_size=said + 300, data=data)
    assert made.report.size_bytes <= said + 300
    pinned = QuantizeOnFitEnd(
        "auto", max_size=said, overrides={"model.0.weight": 8}, dirpath=tmp_path
    )
    with pytest.raises(BudgetError, match="below the smallest"):
        fit(problem, pinned, tmp_path)


def test_trials_whose_metric_is_nan_do_not_hold(problem: Any) -> None:
    model, data, _ = problem
    made = quantize(
        model, "auto", max_drop=0.1, data=data, score=lambda m: 1.0 if m is model else math.nan
    )
    assert not made.report.budget.met
    assert "no allocation keeps the drop of score within 0.1" in made.report.budget.failure
