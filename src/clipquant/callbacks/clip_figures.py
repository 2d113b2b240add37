"""The figures that GradientClipCallback logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl

from clipquant.clip.norms import norms_by_group
from clipquant.clip.progress import Progress
from clipquant.clip.record import ClipRecord

Log = bool | Literal["groups", "params"]


def figures(
    record: ClipRecord, progress: Progress, suffix: str, log: Log, groups: Sequence[str]
) -> dict[str, float]:
    """Return the figures to log by name.

    Args:
        record: What was done in this step.
        progress: What all steps came to.
        suffix: What the names of all figures end with.
        log: What is asked for.
        groups: Names of the parameter groups.
    """
    found = {
        "grad_norm": record.grad_norm,
        "grad_norm_clipped": record.grad_norm_clipped,
        "clip_coef": record.clip_coef,
        "clip_rate": progress.clip_rate,
        "skipped_steps": float(progress.skipped_steps),
        "nonzero_share": record.nonzero_share,
    }
    named = {name + suffix: value for name, value in found.items() if value is not None}
    return named | _detailed_figures(record, suffix, log, groups)


def _detailed_figures(
    record: ClipRecord, suffix: str, log: Log, group_names: Sequence[str]
) -> dict[str, float]:
    """Return the norms of each parameter group or of each parameter, as `log` asks."""
    if log not in ("groups", "params") or record.norms is None or record.norms_clipped is None:
        return {}
    if log == "params":
        keys, before, after = list(record.names), record.norms, record.norms_clipped
    else:
        groups = sorted(set(record.groups))
        keys = [group_names[group] for group in groups]
        before = norms_by_group(record.norms, record.groups, record.order)
        after = norms_by_group(record.norms_clipped, record.groups, record.order)
    named = {
        f"grad_norm{suffix}/{key}": value for key, value in zip(keys, before.tolist(), strict=True)
    }
    return named | {
        f"grad_norm_clipped{suffix}/{key}": value
        for key, value in zip(keys, after.tolist(), strict=True)
    }


def group_names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names that parameter groups bring under the key "name", else their numbers.

    Example:
        >>> group_names([{"name": "head"}, {}, {"name": "head"}])
        ['head', 'group_1', 'group_2']
    """
    names: list[str] = []
    for index, group in enumerate(groups):
        name = str(group.get("name") or f"group_{index}")
        names.append(f"group_{index}" if name in names else name)
    return names


def own_name(callback: Any, callbacks: Sequence[Any]) -> str:
    """Return what tells the figures of a callback from those of others in one Trainer; nothing where it is alone."""
    rivals = [c for c in callbacks if c.log_mode is not False and _overlap(c, callback)]
    if len(rivals) < 2:
        return ""
    kinds = [type(c.rule).__name__ for c in rivals]
    kind, own = type(callback.rule).__name__, rivals.index(callback)
    return f"/{kind}" if kinds.count(kind) == 1 else f"/{kind}_{kinds[:own].count(kind)}"


def _overlap(one: Any, other: Any) -> bool:
    if one.optimizers is None or other.optimizers is None:
        return True
    return not set(one.optimizers).isdisjoint(other.optimizers)


def logs_now(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer logs this step."""
    return bool(
        trainer._logger_connector.should_update_logs or getattr(trainer, "fast_dev_run", False)
    )
