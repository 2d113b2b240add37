"""The time of a step before and after quantizing, both measured in turn on the Trainer's own data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from clipquant.callbacks.calibration import step_forward
from clipquant.callbacks.data import calibration_batches
from clipquant.callbacks.guest import stand_in
from clipquant.report.record import Latency

SECONDS = 2.0  # to spend on it, about
_LEAST, _MOST = 3, 30


def measure_latency(
    trainer: pl.Trainer, module: pl.LightningModule, state: Mapping[str, Tensor]
) -> Latency | None:
    """Return the median time of a step of `module` on the CPU, with its own weights and with others.

    The step is `validation_step`, or `forward` without one, on one batch of the train data. The first
    call of each warms up and is not counted.

    Args:
        trainer: The Trainer that has fitted.
        module: Detached from it, on the CPU; not touched.
        state: The weights to compare with.

    Returns:
        Both medians; None where there are no data or the step cannot run on them.
    """
    try:
        batch = calibration_batches(trainer, 1)[0]
    except (ValueError, RuntimeError):
        return None
    run = step_forward(trainer, module)
    with isolate_rng(), torch.inference_mode(), stand_in(module) as one, stand_in(module) as other:
        other.load_state_dict(dict(state), strict=False)
        pair = (one.eval(), other.eval())
        times: tuple[list[float], list[float]] = ([], [])
        spent, count = 0.0, 0
        while count <= _LEAST or (spent < SECONDS and count <= _MOST):
            for model, own in zip(pair, times, strict=True):
                start = time.perf_counter()
                try:
                    run(model, batch)
                except Exception:  # a step that does not take train batches has no latency to show
                    return None
                own.append(time.perf_counter() - start)
                spent += own[-1]
            count += 1
    before, after = (1e3 * statistics.median(own[1:]) for own in times)
    what = (
        "validation_step"
        if is_overridden("validation_step", module, pl.LightningModule)
        else "forward"
    )
    return Latency(before, after, _batch_size(batch), torch.get_num_threads(), what)


def _batch_size(batch: Any) -> int:
    try:
        return extract_batch_size(batch)
    except Exception:  # a batch of unknown make has no size; only a label of the report wants it
        return 0
