"""Which weights are kept: masks from scores, over a whole network, a layer, or in a pattern of N among M."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.errors import ArgumentError
from clipquant.quant.codes.layout import Layout

Masks = dict[str, Tensor]

LEAST = 0.1  # share of its part of what is kept that every layer keeps at least


def global_masks(scores: Mapping[str, Tensor], sparsity: float) -> Masks:
    """Return masks that keep the weights of highest score over all layers together.

    Every layer keeps at least a tenth of what it would keep if all were equally sparse, and one weight,
    so that none is cut through.

    Args:
        scores: Name of a weight -> what each of its elements counts; ties go to the later element.
        sparsity: Share of all that is pruned.

    >>> global_masks({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}, 0.5)
    {'a': tensor([False,  True]), 'b': tensor([False,  True])}
    """
    raised = []
    for score in scores.values():
        own = score.detach().float().flatten().clone()
        least = max(round(LEAST * (1 - sparsity) * own.numel()), 1)
        own[own.topk(least).indices] = torch.inf
        raised.append(own)
    flat = torch.cat(raised)
    mask = _highest(flat, _kept(flat.numel(), sparsity))
    sizes = [score.numel() for score in scores.values()]
    parts = mask.split(sizes)
    return {n: p.reshape(scores[n].shape) for n, p in zip(scores, parts, strict=True)}


def layer_masks(scores: Mapping[str, Tensor], sparsity: float) -> Masks:
    """Return masks that keep the same share of each layer, one weight at least.

    >>> layer_masks({"a": torch.tensor([1.0, 2.0])}, 0.5)
    {'a': tensor([False,  True])}
    """
    return {
        name: _highest(s.detach().float().flatten(), _kept(s.numel(), sparsity)).reshape(s.shape)
        for name, s in scores.items()
    }


@dataclass(frozen=True)
class Pattern:
    """N weights kept among every M neighbours along the inputs of an output.

    Args:
        kept: N.
        among: M.

    Source:
        Mishra et al. 2021, arXiv 2104.08378 (2:4 sparsity).

    >>> Pattern.of("2:4").sparsity
    0.5
    """

    kept: int
    among: int

    @classmethod
    def of(cls, text: str) -> Pattern:
        """Return the pattern that "N:M" names, or raise.

        >>> Pattern.of("4:2")
        Traceback (most recent call last):
        ...
        clipquant.errors.ArgumentError: pattern must be 'N:M' with 0 < N < M, as '2:4'; got '4:2'.
        """
        found = re.fullmatch(r"(\d+):(\d+)", text) if isinstance(text, str) else None
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise ArgumentError(f"pattern must be 'N:M' with 0 < N < M, as '2:4'; got {text!r}.")
        return cls(int(found[1]), int(found[2]))

    @property
    def sparsity(self) -> float:
        """The share that is pruned."""
        return 1 - self.kept / self.among

    def masks(
        self, scores: Mapping[str, Tensor], layouts: Mapping[str, Layout], share: float
    ) -> Masks:
        """Return masks of the pattern for a share of each weight's groups, those first that lose least.

        A last group that is short keeps all.

        Args:
            scores: Name of a weight -> what each of its elements counts.
            layouts: Name of a weight -> how it folds into rows.
            share: Of the groups, 0 to 1.
        """
        found = {}
        for name, score in scores.items():
            layout = layouts[name]
            matrix = layout.fold(score.detach().float())
            whole = matrix.shape[1] // self.among * self.among
            mask = torch.ones_like(matrix, dtype=torch.bool)
            groups = matrix[:, :whole].reshape(-1, self.among)
            if len(groups):
                order = groups.argsort(dim=1, descending=True, stable=True)
                own = torch.zeros_like(groups, dtype=torch.bool)
                own.scatter_(1, order[:, : self.kept], True)
                lost = groups.masked_fill(own, 0.0).sum(1)
                waiting = torch.ones(len(groups), dtype=torch.bool, device=groups.device)
                waiting[lost.argsort(stable=True)[: round(share * len(groups))]] = False
                mask[:, :whole] = (own | waiting[:, None]).reshape(len(matrix), whole)
            found[name] = layout.unfold(mask)
        return found


def _kept(count: int, sparsity: float) -> int:
    return min(max(round((1 - sparsity) * count), 1), count)


def _highest(scores: Tensor, count: int) -> Tensor:
    """Return a mask of exactly `count` elements of highest score."""
    order = scores.nan_to_num(-torch.inf).argsort(stable=True)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[len(scores) - count :]] = True
    return mask
