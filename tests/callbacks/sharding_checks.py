"""What processes that each hold a part of a module check together: one file, as one process alone would write it.

Run by test_sharding.py; see tests/two_processes.py.
"""

import os
import tempfile
import warnings
from pathlib import Path
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader, TensorDataset
from two_processes import COUNT, tell_lightning

from clipquant import GradientClipCallback, QuantizeOnFitEnd, load_quantized
from clipquant.artifact import read_metadata
from clipquant.callbacks import sharding
from clipquant.callbacks.failures import QuantizationError
from clipquant.callbacks.shares import Task
from clipquant.errors import ArgumentError


class Words(pl.LightningModule):
    """An embedding tied to the decoder, layers of rows that processes cannot share equally, and running statistics."""

    def __init__(self, rate=0.1, sharded=False, width=51):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(65, 32)
        self.net = nn.Sequential(
            nn.Linear(32, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 32)
        )
        self.decode = nn.Linear(32, 65)
        self.decode.weight = self.embed.weight
        self.rate, self.sharded = rate, sharded

    def configure_model(self):
        if self.sharded and not isinstance(self.net[0].weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net[3], mesh=mesh)
            fully_shard(self, mesh=mesh)

    def forward(self, x):
        return self.decode(self.net(self.embed(x)))

    def on_train_batch_start(self, batch, _):
        self.net[1].eval()  # its statistics stay

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, i):
        self.log("val_loss", self.training_step(batch, i))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)


def data():
    x = torch.randint(0, 65, (48,), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x * 7) % 65), 8)


def shared_folder():
    found = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return Path(found[0])


class Whole(pl.Callback):
    """Keeps the whole weights, as the engine itself gives them, before it is torn down."""

    def on_train_end(self, trainer, pl_module):
        if isinstance(trainer.strategy, FSDPStrategy):
            self.state = {k: t.clone() for k, t in trainer.strategy.model.state_dict().items()}
            return
        state = pl_module.state_dict()
        self.state = {
            k: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
            for k, t in state.items()
        }


class OnCPU(FSDPStrategy):
    """FSDP where there is no accelerator: Lightning and torch refuse it only for want of one."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def fit(model, callback, folder, *callbacks, **settings):
    arguments = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "default_root_dir": folder,
        **settings,
    }
    trainer = pl.Trainer(callbacks=[callback, *callbacks], **arguments)
    trainer.fit(model, data(), None if settings.get("limit_val_batches") == 0 else data())
    return trainer, model


def together(strategy, callback, *callbacks, model=None, **settings):
    """Fit over all processes; return the module and the weights it was trained to."""
    tell_lightning()
    whole, folder = Whole(), shared_folder()
    callback.dirpath = folder
    _, model = fit(
        model or Words(sharded=isinstance(strategy, ModelParallelStrategy)),
        callback,
        folder,
        *callbacks,
        whole,
        strategy=strategy,
        devices=COUNT,
        plugins=[LightningEnvironment()],
        **settings,
    )
    return model, whole.state


def alone(state, callback, **settings):
    """Fit weights that stay as they are in this process; return the bytes of the file."""
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    model = Words(rate=0.0)
    model.load_state_dict(state)
    callback.dirpath = Path(tempfile.mkdtemp())
    fit(model, callback, callback.dirpath, devices=1, **settings)
    return callback.artifact_path.read_bytes()


def parts():
    return ModelParallelStrategy(
        data_parallel_size=COUNT, tensor_parallel_size=1, process_group_backend="gloo"
    )


def flat():
    return OnCPU(process_group_backend="gloo", auto_wrap_policy={nn.Sequential})


def ddp():
    return DDPStrategy(process_group_backend="gloo")


def whole_of(model):
    return {
        k: t.full_tensor() if isinstance(t, DTensor) else t for k, t in model.state_dict().items()
    }


def differences(one, other):
    """Return which parts of two files differ."""
    files = [Path(tempfile.mkdtemp()) / "model.safetensors" for _ in range(2)]
    for file, content in zip(files, (one, other), strict=True):
        file.write_bytes(content)
    states = list(map(load_quantized, files))
    keys = [k for k in states[0] if not torch.equal(states[0][k], states[1][k])]
    return keys, *(read_metadata(file) for file in files)


def assert_as_alone(strategy, *given, **named):
    """The file is that of one process with the same weights, and all processes hold what it holds."""
    settings = named.pop("settings", {})
    callback = QuantizeOnFitEnd(*given, **named)
    model, state = together(strategy, callback, **settings)
    assert callback.report.failures == ()
    held = callback.artifact_path.read_bytes()
    single = alone(state, QuantizeOnFitEnd(*given, **named), **settings)
    assert single == held, differences(single, held)
    assert alone(state, QuantizeOnFitEnd(5), **settings) != held
    if not isinstance(strategy, FSDPStrategy):
        stored = load_quantized(callback.artifact_path)
        own = whole_of(model)
        assert own.keys() == stored.keys()
        assert all(torch.equal(own[k], stored[k]) for k in stored)
    return callback, model


def check_parts_give_the_file_of_one_process():
    callback, model = assert_as_alone(parts(), 8)
    assert isinstance(model.net[0].weight, DTensor)
    assert callback.report.quantized_metrics
    assert {layer.method for layer in callback.report.layers} == {"rtn"}


def check_parts_give_the_file_of_one_process_by_a_method_that_needs_data():
    callback, _ = assert_as_alone(parts(), 3, method="gptq", overrides={"net.3*": 4})
    assert "gptq" in {layer.method for layer in callback.report.layers}


def check_flat_parameters_give_the_file_of_one_process():
    assert_as_alone(flat(), 4, method="mse")


def check_copies_give_the_file_of_one_process():
    assert_as_alone(ddp(), 4, calibration_batches=2)


def streamed(strategy, *given, **named):
    """Quantize where no process has room for the network; return what was told, and how many layers each coded."""
    counted = []

    def share(task, weight, own=Task.share):
        counted.append((task.name, weight.numel()))
        return own(task, weight)

    callback = QuantizeOnFitEnd(*given, **named)
    with (
        patch.object(sharding, "available_bytes", lambda: 1000),
        patch.object(Task, "share", share),
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        model, state = together(strategy, callback)
    found = [None] * COUNT
    dist.all_gather_object(found, (len(counted), "".join(str(w.message) for w in told)))
    counts, said = zip(*found, strict=True)
    return callback, model, state, said[0], counts  # the first process warns for all


def check_without_room_for_the_network_layers_are_coded_one_by_one():
    for strategy, method in ((parts, "gptq"), (flat, "hqq")):
        callback, model, state, told, counts = streamed(strategy(), 4, method=method)
        assert "a layer at a time" in told
        assert sum(counts) == 3
        assert min(counts) > 0 or COUNT > 3
        assert callback.report.quantized_metrics == {}
        method = "auto" if method == "gptq" else method
        quiet = {"limit_val_batches": 0}
        reference = QuantizeOnFitEnd(4, method=method, calibration_batches=0)
        assert alone(state, reference, **quiet) == callback.artifact_path.read_bytes()
        stored = load_quantized(callback.artifact_path)
        if strategy is parts:
            assert all(torch.equal(v, stored[k]) for k, v in whole_of(model).items())


def check_what_needs_the_network_is_refused_where_it_has_no_room():
    small = patch.object(sharding, "available_bytes", lambda: 1000)
    with small, pytest.raises(ArgumentError, match=r"1e-06 GB are free.*Set bits"):
        together(parts(), QuantizeOnFitEnd("auto", max_drop=0.1))


def check_weights_that_are_not_finite_stay_in_float_alone():
    class Broken(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.net[3].weight.mul_(torch.inf)

    for free in (1000, None):
        callback = QuantizeOnFitEnd(4, method="mse")
        with patch.object(sharding, "available_bytes", lambda free=free: free):
            together(parts(), callback, Broken())
        assert {layer.name for layer in callback.report.layers} == {"embed.weight", "net.0.weight"}
        assert "net.3.weight" in {item.name for item in callback.report.left}


def check_a_process_that_cannot_gather_keeps_nobody_waiting():
    def broken(self):
        if dist.get_rank() == 1:
            raise MemoryError("no room")

    callback = QuantizeOnFitEnd(4)
    with patch.object(sharding.Sharding, "_gather_shares_", broken):
        model, state = together(parts(), callback)
    assert callback.report is None
    assert all(torch.equal(v, state[k]) for k, v in whole_of(model).items())


def check_both_callbacks_and_two_of_a_kind_work_together():
    other, folder = QuantizeOnFitEnd(3, method="gptq"), shared_folder()
    other.dirpath = folder
    clip, callback = GradientClipCallback(0.01), QuantizeOnFitEnd(8)
    model, state = together(parts(), callback, clip, other)
    assert clip.record.grad_norm_clipped < clip.record.grad_norm
    for same, made in (
        (QuantizeOnFitEnd(8), callback),
        (QuantizeOnFitEnd(3, method="gptq"), other),
    ):
        single, held = alone(state, same), made.artifact_path.read_bytes()
        assert single == held, differences(single, held)
    stored, own = load_quantized(other.artifact_path), whole_of(model)
    assert all(torch.equal(own[k], v) for k, v in stored.items())  # the last one's


def check_rehearsal_finds_what_would_fail():
    class Fails(Words):
        def validation_step(self, batch, i):
            if self.trainer.world_size == 1:  # not where the Trainer itself validates
                raise KeyError("one batch alone")

    callback = QuantizeOnFitEnd(8, on_fail="raise")
    with pytest.raises(QuantizationError, match="one batch alone"):
        together(parts(), callback, model=Fails(sharded=True))


def check_the_best_checkpoint_of_parts_is_quantized():
    for distributed in (True, False):
        best = ModelCheckpoint(shared_folder(), monitor="val_loss", mode="max", filename="{epoch}")
        strategy = parts()
        strategy._save_distributed_checkpoint = distributed
        callback = QuantizeOnFitEnd(8, weights="best", mode="min", monitor="val_loss")
        settings = {"enable_checkpointing": True, "max_epochs": 2}
        model, state = together(strategy, callback, best, **settings)
        assert callback.report.failures == ()
        assert "epoch=0" in best.best_model_path
        stored, own = load_quantized(callback.artifact_path), whole_of(model)
        assert all(torch.equal(own[k], v) for k, v in stored.items())
        name = "net.3.weight"
        gap = (stored[name] - state[name]).abs().max()
        assert (
            gap > 3 * callback.report.layers[-1].histogram.high / 127
        )  # other weights than the last


def check_rows_and_columns_shared_over_two_dimensions():
    class Grid(Words):
        def configure_model(self):
            if not isinstance(self.net[0].weight, DTensor):
                style = {"0": ColwiseParallel(), "3": RowwiseParallel()}
                parallelize_module(self.net, self.device_mesh["tensor_parallel"], style)
                fully_shard(self, mesh=self.device_mesh["data_parallel"])

        def forward(self, x):
            x = self.net[0](self.embed(x))
            return self.decode(self.net[3](torch.tanh(x)))

    strategy = ModelParallelStrategy(
        data_parallel_size=max(COUNT // 2, 1),
        tensor_parallel_size=2,
        process_group_backend="gloo",
    )
    callback = QuantizeOnFitEnd(8, include=["*weight"])
    model, state = together(strategy, callback, model=Grid(width=52), limit_val_batches=0)
    assert callback.report.failures == ()
    stored, own = load_quantized(callback.artifact_path), whole_of(model)
    assert all(torch.equal(own[k], v) for k, v in stored.items())
    assert all(
        (stored[k] - v).abs().max() < 0.05 for k, v in state.items() if v.is_floating_point()
    )
