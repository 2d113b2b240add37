"""What two processes check together: they train quantized and prune as one.

Run by test_training_distributed.py; see tests/two_processes.py.
"""

import io
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from two_processes import tell_lightning

from clipquant import (
    QuantizationAwareTraining,
    QuantizeOnFitEnd,
    SparsifyWeights,
    load_quantized,
)
from clipquant.callbacks.road.ranks import gathered

sys.path.insert(0, str(Path(__file__).parent))
from small_fit import Small, fit


def check_both_train_on_the_same_grids_with_the_same_zeros():
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    tell_lightning()
    for by in ("magnitude", "gradient"):
        torch.manual_seed(0)
        quantizer = QuantizeOnFitEnd(dirpath=f"{folder[0]}/{by}")
        qat = QuantizationAwareTraining(2, start=0.4, distill=1.0)
        with redirect_stdout(io.StringIO()):
            trainer, model = fit(
                quantizer, folder[0], Small(),
                [qat, SparsifyWeights(0.5, stop=0.5, by=by)],
                strategy=DDPStrategy(process_group_backend="gloo"), devices=2,
                plugins=[LightningEnvironment()], max_epochs=4,
            )  # fmt: skip
        assert trainer.world_size == 2
        assert quantizer.report.failures == ()
        state, own = load_quantized(f"{folder[0]}/{by}/model.safetensors"), model.state_dict()
        assert all(torch.equal(own[name], value) for name, value in state.items())
        assert float((own["net.3.weight"] == 0).float().mean()) >= 0.4
        moved = gathered([g.grid.scale.tolist() for g in qat.trained.values()])
        assert moved[0] == moved[1]
