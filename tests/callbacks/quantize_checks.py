"""What two processes check together: one result for both, no waiting, no collective that meets nobody.

Run by road/test_ranks.py; see tests/two_processes.py.
"""

import io
import os
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from callbacks.test_quantize import Small, fit
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.distributed_c10d import _get_default_store
from torchmetrics import Accuracy
from two_processes import tell_lightning

from clipquant import QuantizeOnFitEnd, load_quantized
from clipquant.callbacks.failures import QuantizationError
from clipquant.callbacks.road import ranks
from clipquant.callbacks.road.ranks import alone, from_first, gathered, leaving, meet


def shared_folder():
    """Make a folder in the first process and tell its path to both."""
    found = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def two(callback, folder, model=None):
    """Fit in both processes; return the Trainer, the module and what was printed."""
    tell_lightning()
    with redirect_stdout(io.StringIO()) as said:
        trainer, model = fit(
            callback,
            folder,
            model,
            strategy=DDPStrategy(process_group_backend="gloo"),
            devices=2,
            plugins=[LightningEnvironment()],
        )
    assert (trainer.world_size, trainer.global_rank) == (2, dist.get_rank())
    return trainer, model, said.getvalue()


def check_each_module_holds_what_the_file_holds():
    folder = shared_folder()
    _, model, said = two(QuantizeOnFitEnd(4, dirpath=folder), folder)
    state, own = load_quantized(f"{folder}/model.safetensors"), model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], value) for name, value in state.items())
    assert said.count("Quantized") == (dist.get_rank() == 0)


def check_the_default_folder_is_one_and_both_know_the_file():
    folder = shared_folder()
    callback = QuantizeOnFitEnd(8)
    two(callback, folder)
    assert str(callback.artifact_path) == f"{folder}/quantized/model.safetensors"
    assert callback.artifact_path.is_file()
    assert callback.report.path == str(callback.artifact_path)


class Talks(Small):
    """Calls collectives in its validation, which in a fit every process does."""

    def __init__(self):
        super().__init__()
        self.accuracy = Accuracy("multiclass", num_classes=10)

    def validation_step(self, batch, index):
        out = self.net(batch[0])
        dist.all_reduce(out)
        self.accuracy.update(out, batch[1])
        self.log("val_acc", self.accuracy.compute())
        self.log("val_loss", self.all_gather(out).float().mean(), sync_dist=True)


def check_collectives_in_a_step_meet():
    for bits in (8, 4):
        callback = QuantizeOnFitEnd(bits, dirpath=shared_folder())
        two(callback, callback.dirpath, Talks())
        assert callback.report.failures == ()
        assert callback.report.quantized_metrics


class FailsOn(Small):
    """Raises in one process alone, once the training is over."""

    def __init__(self, rank):
        super().__init__()
        self.rank, self.over = rank, False

    def on_train_end(self):
        self.over = True
        self.trained = {k: v.clone() for k, v in self.state_dict().items()}

    def validation_step(self, batch, index):
        if self.over and int(os.environ["LOCAL_RANK"]) == self.rank:
            raise KeyError("one alone")
        super().validation_step(batch, index)


def check_a_process_that_fails_keeps_nobody_waiting():
    found = []
    for rank in (0, 1):
        callback, start = QuantizeOnFitEnd(4, dirpath=shared_folder()), time.monotonic()
        _, model, _ = two(callback, callback.dirpath, FailsOn(rank))
        assert time.monotonic() - start < 20
        stored = load_quantized(callback.artifact_path)
        assert all(torch.equal(v, stored[k]) for k, v in model.state_dict().items())
        found.append(len(callback.report.failures))
    assert found[0] > 0  # what the first process did counts
    assert found[1] == 0


def check_one_error_in_all_processes_where_it_is_asked_for():
    callback = QuantizeOnFitEnd(4, dirpath=shared_folder(), on_fail="raise")
    with pytest.raises(QuantizationError, match="one alone"):
        two(callback, callback.dirpath, FailsOn(0))
    assert callback.artifact_path.is_file()


def check_a_folder_that_the_first_process_cannot_write_is_told_by_both():
    folder = Path(shared_folder())
    if dist.get_rank() == 0:
        (folder / "file").write_text("in the way")
    dist.barrier()
    with pytest.raises(OSError, match="cannot write"):
        two(QuantizeOnFitEnd(8, dirpath=folder / "file" / "out"), folder)


def check_alone_a_process_meets_itself():
    with alone():
        assert (dist.get_world_size(), dist.get_rank()) == (1, 0)
        value = torch.ones(1)
        dist.all_reduce(value)
        assert float(value) == 1
    assert dist.get_world_size() == 2
    assert gathered(dist.get_rank()) == [0, 1]
    assert from_first(dist.get_rank()) == 0


def check_a_process_that_leaves_is_noticed():
    if dist.get_rank() == 1:
        with pytest.raises(SystemExit), leaving():
            raise SystemExit
        next(ranks._numbers)  # the meeting that the other has come to
    else:
        with pytest.raises(RuntimeError, match="process 1 has left"):
            meet()
    dist.barrier()
    if dist.get_rank() == 0:  # it is back for the checks of other scripts
        _get_default_store().delete_key("clipquant/left/1")
    dist.barrier()
