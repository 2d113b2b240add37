"""What two processes check together: QuantizeOnFitEnd leaves in each what the file holds.

Run by test_quantize.py; see tests/two_processes.py.
"""

import io
import tempfile
from contextlib import redirect_stdout

import torch
import torch.distributed as dist
from callbacks.test_quantize import fit
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from two_processes import tell_lightning

from clipquant import QuantizeOnFitEnd, load_quantized


def shared_folder():
    """Make a folder in the first process and tell its path to both."""
    found = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def check_each_module_holds_what_the_file_holds():
    tell_lightning()
    folder = shared_folder()
    callback = QuantizeOnFitEnd(4, dirpath=folder)
    with redirect_stdout(io.StringIO()) as said:
        trainer, model = fit(
            callback,
            folder,
            strategy=DDPStrategy(process_group_backend="gloo"),
            devices=2,
            plugins=[LightningEnvironment()],
        )
    assert (trainer.world_size, trainer.global_rank) == (2, dist.get_rank())
    state, own = load_quantized(f"{folder}/model.safetensors"), model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], value) for name, value in state.items())
    assert said.getvalue().count("Quantized") == (dist.get_rank() == 0)
