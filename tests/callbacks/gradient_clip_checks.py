"""What two processes check together: a Trainer over two processes clips as a Trainer over one.

Run by test_gradient_clip_distributed.py; see tests/two_processes.py.
"""

import math
import os

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from two_processes import tell_lightning

from clipquant import GradientClipCallback
from clipquant.clip import AutoClip, Norm, Value

RULES = [Value(0.05), Norm(0.1), AutoClip(30)]
STEPS = 4


class Model(pl.LightningModule):
    """Layers of 5 and 3 rows, which two processes cannot share equally."""

    def __init__(self, bad_step=None, sharded=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.bad_step, self.sharded = bad_step, sharded

    def configure_model(self):
        if self.sharded and not isinstance(self.net[0].weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean() * (1 + batch_idx)
        # The last process alone has the bad batch.
        bad = batch_idx == self.bad_step and self.global_rank == self.trainer.world_size - 1
        return loss * math.nan if bad else loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Data(torch.utils.data.Dataset):
    """Inputs that depend on their index alone."""

    def __len__(self):
        return 4 * STEPS

    def __getitem__(self, index):
        return torch.randn(6, generator=torch.Generator().manual_seed(index))


def fit(model, callback, **settings):
    arguments = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "callbacks": [callback],
        **settings,
    }
    trainer, data = pl.Trainer(**arguments), Data()
    count, rank = trainer.num_devices, dist.get_rank() if trainer.num_devices > 1 else 0
    sampler = torch.utils.data.DistributedSampler(data, count, rank, shuffle=False)
    trainer.fit(model, torch.utils.data.DataLoader(data, 4 // count, sampler=sampler))
    return trainer


class Whole(pl.Callback):
    """Keeps the whole weights before the strategy is torn down."""

    def on_train_end(self, trainer, pl_module):
        self.weights = [
            (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for p in pl_module.parameters()
        ]


def together(strategy, rule, bad_step=None, **settings):
    """Fit over both processes; return the callback, the weights and the trainer."""
    tell_lightning()
    callback, whole = GradientClipCallback(rule, **settings), Whole()
    sharded = isinstance(strategy, ModelParallelStrategy)
    trainer = fit(
        Model(bad_step, sharded),
        callback,
        strategy=strategy,
        devices=2,
        callbacks=[callback, whole],
        plugins=[LightningEnvironment()],
        use_distributed_sampler=False,
    )
    return callback, whole.weights, trainer


def alone(rule, bad_step=None, **settings):
    """Fit in this process."""
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    callback, whole = GradientClipCallback(rule, **settings), Whole()
    trainer = fit(
        Model(bad_step),
        callback,
        strategy="auto",
        devices=1,
        callbacks=[callback, whole],
    )
    return callback, whole.weights, trainer


def assert_same(strategy, rule, **settings):
    ours, weights, trainer = together(strategy, rule, **settings)
    reference, expected, single = alone(rule, **settings)
    for a, b in zip(weights, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m: f"{rule}: {m}")
    for name in ("grad_norm", "grad_norm_clipped"):
        a, b = getattr(ours.record, name), getattr(reference.record, name)
        assert math.isclose(a, b, rel_tol=1e-4), (rule, name, a, b)
        logged = float(trainer.callback_metrics[name])
        assert math.isclose(logged, float(single.callback_metrics[name]), rel_tol=1e-4), (
            rule,
            name,
        )
    return ours, reference


def ddp():
    return DDPStrategy(process_group_backend="gloo")


def model_parallel():
    return ModelParallelStrategy(2, 1, process_group_backend="gloo")


def check_ddp():
    for rule in RULES:
        assert_same(ddp(), rule)


def check_model_parallel():
    for rule in RULES:
        assert_same(model_parallel(), rule)


def check_model_parallel_logs_every_parameter():
    ours, reference = assert_same(model_parallel(), Norm(0.1), log="params")
    torch.testing.assert_close(
        ours.record.norms.double(), reference.record.norms.double(), rtol=1e-4, atol=1e-6
    )


def check_a_bad_batch_on_one_process_is_skipped_on_both():
    for strategy in (ddp, model_parallel):
        for rule in (Value(0.05), Norm(0.1)):
            ours, weights, _ = together(strategy(), rule, bad_step=1)
            progress = ours.state_dict()["optimizers"][0]
            assert (progress["steps"], progress["skipped_steps"]) == (STEPS, 1), (strategy, rule)
            _, expected, _ = alone(rule, bad_step=1)
            for a, b in zip(weights, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
