"""What SparsifyWeights refuses before training: settings that do not go together, alone or in one Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from clipquant.callbacks.course import check_same
from clipquant.callbacks.lightning import package_of
from clipquant.callbacks.qat_checks import refuse_shards_of
from clipquant.errors import ArgumentError
from clipquant.quant.network.layers import Target
from clipquant.quant.training.masks import Pattern

FINAL = 0.9


def as_sparsity(final: Any, pattern: Pattern | None) -> float:
    """Return the final sparsity, or raise.

    >>> as_sparsity(None, None), as_sparsity(None, Pattern(2, 4))
    (0.9, 0.5)
    """
    if pattern is not None:
        if final is not None:
            raise ArgumentError(
                f"pattern='{pattern.kept}:{pattern.among}' prunes {pattern.sparsity:.0%}; got final={final!r} beside "
                "it. Give one of them."
            )
        return pattern.sparsity
    if final is None:
        return FINAL
    number = isinstance(final, (int, float)) and not isinstance(final, bool)
    if not number or not 0 < final < 1:
        raise ArgumentError(
            f"final is the share of weights that is pruned, above 0 and below 1; got {final!r}. At 1 nothing would be "
            "left."
        )
    return float(final)


def check_beside(trainer: pl.Trainer) -> None:
    """Raise for what cannot stand in one Trainer with a callback that prunes."""
    refuse_shards_of(trainer, "SparsifyWeights")
    if any(
        isinstance(other, package_of(trainer).callbacks.ModelPruning)
        for other in trainer.callbacks  # type: ignore[attr-defined]
    ):
        raise ArgumentError(
            "SparsifyWeights and ModelPruning would prune the same weights, which ModelPruning keeps under other "
            "names. Leave one of them out."
        )


def settings_of(callback: Any) -> dict[str, Any]:
    """Return what tells prunings apart, as a checkpoint holds it; raises where they cannot be."""
    if callback.start > callback.stop:
        raise ArgumentError(
            f"pruning ends after it has begun; got start={callback.start:g}, stop={callback.stop:g}. Give a stop of "
            f"{callback.start:g} or more."
        )
    pattern = callback.pattern
    return {
        "final": callback.final,
        "pattern": None if pattern is None else f"{pattern.kept}:{pattern.among}",
        "scope": callback.scope,
        "by": callback.by,
    }


def check_resumed(callback: Any, loaded: Mapping[str, Any], targets: Sequence[Target]) -> None:
    """Raise where a checkpoint's masks are for other weights, or were chosen otherwise, than is asked now."""
    what = "the masks of its checkpoint: SparsifyWeights"
    check_same(what, settings_of(callback), loaded["settings"])
    own = {target.name for target in targets}
    others = sorted(own ^ set(loaded["masks"])) if loaded["masks"] else []
    if others:
        raise ArgumentError(
            f"a fit goes on with the masks of its checkpoint; {', '.join(others[:5])} differ. Give include and exclude "
            "as they were."
        )
