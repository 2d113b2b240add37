"""The figures that GradientClipCallback logs."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl

from clipquant.clip.norms import norms_by_group
from clipquant.clip.progress import Progress
from clipquant.clip.record import ClipRecord

Log = bool | Literal["groups", "params"]


def figures(record: ClipRecord, progress: Progress, suffix: str, log: Log) -> dict[str, float]:
    """Return the figures to log by name."""
    found = {
        "grad_norm": record.grad_norm,
        "grad_norm_clipped": record.grad_norm_clipped,
        "clip_coef": record.clip_coef,
        "clip_rate": progress.clip_rate,
        "skipped_steps": float(progress.skipped_steps),
        "nonzero_share": record.nonzero_share,
    }
    named = {name + suffix: value for name, value in found.items() if value is not None}
    return named | _detailed_figures(record, suffix, log)


def _detailed_figures(record: ClipRecord, suffix: str, log: Log) -> dict[str, float]:
    """Return the norms of each parameter group or of each parameter, as `log` asks."""
    if log not in ("groups", "params") or record.norms is None or record.norms_clipped is None:
        return {}
    if log == "params":
        keys, before, after = list(record.names), record.norms, record.norms_clipped
    else:
        groups = sorted(set(record.groups))
        keys = [f"group_{group}" for group in groups]
        before = norms_by_group(record.norms, record.groups, record.order)
        after = norms_by_group(record.norms_clipped, record.groups, record.order)
    named = {
        f"grad_norm{suffix}/{key}": value for key, value in zip(keys, before.tolist(), strict=True)
    }
    return named | {
        f"grad_norm_clipped{suffix}/{key}": value
        for key, value in zip(keys, after.tolist(), strict=True)
    }


def logs_now(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer logs this step."""
    return bool(
        trainer._logger_connector.should_update_logs or getattr(trainer, "fast_dev_run", False)
    )
