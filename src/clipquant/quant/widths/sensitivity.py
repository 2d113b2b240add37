"""How much the loss rises when a weight is rounded: squared gradients, one backward pass a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipquant.errors import ArgumentError, ArgumentTypeError
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.layers import Target, is_lookup
from clipquant.quant.widths.frontier import WIDTHS

PRIOR = 64  # samples that the mean of all rows counts as
Loss = Callable[[nn.Module, Any], tuple[Tensor, int]]  # a batch's mean loss, and its samples


def squared_gradients(
    model: nn.Module, targets: Sequence[Target], calibration: Calibration, loss: Loss
) -> dict[str, Tensor]:
    """Return E[g^2] of each weight, g the gradient of one sample's loss; the model is not changed.

    The gradients of samples are taken as independent and of zero mean, as they are at the end of a
    training, so that a batch of n samples with mean loss L gives n (dL/dw)^2.

    Args:
        model: In eval mode.
        targets: Its weights.
        calibration: Batches; `loss` takes each as the loop brings it.
        loss: Gives the mean loss of a batch, with a graph, and the number of its samples.

    Returns:
        Name of a weight -> float32 (rows, columns), 0 where no batch reaches it.

    Raises:
        ValueError: If there is no batch, or a loss is NaN or infinite, naming the batch.

    Source:
        The diagonal of the empirical Fisher information, LeCun et al. 1990 ("Optimal Brain Damage").
    """
    sums, _, count, _ = _collected(model, targets, calibration, loss)
    return {target.name: total / count for target, total in zip(targets, sums, strict=True)}


def believed_gradients(
    model: nn.Module, targets: Sequence[Target], calibration: Calibration, loss: Loss
) -> dict[str, Tensor]:
    """Return E[g^2] of each weight as far as the data are to be believed; see `believed`.

    Weights that are looked up are as they were seen: what no batch looks up has a rule of its own.

    Args:
        model: In eval mode.
        targets: Its weights.
        calibration: Batches; `loss` takes each as the loop brings it.
        loss: Gives the mean loss of a batch, with a graph, and the number of its samples.

    Raises:
        ValueError: As `squared_gradients`.
    """
    sums, squares, count, samples = _collected(model, targets, calibration, loss)
    return {
        target.name: total / count
        if is_lookup(model, target)
        else believed(total / count, square / count, count, samples)
        for target, total, square in zip(targets, sums, squares, strict=True)
    }


def _collected(
    model: nn.Module, targets: Sequence[Target], calibration: Calibration, loss: Loss
) -> tuple[list[Tensor], list[Tensor], int, int]:
    """Return the sums of g^2, those of the squares of each row's sum, and how many batches and samples there were."""
    sums = [torch.zeros(t.layout.rows, t.layout.columns) for t in targets]
    squares = [torch.zeros(t.layout.rows, dtype=torch.float64) for t in targets]
    weights = [target.weight for target in targets]
    trained = [weight.requires_grad for weight in weights]
    count, seen, reached = 0, 0, False

    def visit(_number: int, batch: Any) -> None:
        nonlocal count, seen, reached
        count += 1
        with torch.enable_grad():
            value, samples = loss(model, batch)
            _check_loss(value, count)
            seen += samples
            slopes = torch.autograd.grad(value, weights, allow_unused=True)
        for total, square, target, slope in zip(sums, squares, targets, slopes, strict=True):
            if slope is not None:
                reached = True
                own = target.layout.fold(slope.float()).square_().cpu().mul_(samples)
                total.add_(own)
                square.add_(own.sum(1, dtype=torch.float64).square_())

    try:
        for weight in weights:
            weight.requires_grad_(True)
        calibration.each(visit)
    finally:
        for weight, flag in zip(weights, trained, strict=True):
            weight.requires_grad_(flag)
    if not count:
        raise ArgumentError(
            "bits='auto' estimates sensitivities from data, and there was no batch. "
            "Pass data that is not empty (an iterator gives its batches only once)."
        )
    if not reached:
        raise ArgumentError(
            "no weight to quantize has a gradient: the loss does not depend on them. Check that the model runs "
            "its layers on the batch and does not detach their outputs."
        )
    return sums, squares, count, seen


def believed(fisher: Tensor, square: Tensor, pieces: int, samples: int) -> Tensor:
    """Return E[g^2] drawn towards the mean of all rows by the share of the rows' differences that is chance.

    A row that the data seen did not ask much of, such as that of a class that they do not show, is
    not known to matter little. The share is that by which the pieces' sums differ, and with n samples
    at least 64 / (64 + n): the mean counts as much as 64 samples do.

    Args:
        fisher: (rows, columns): the mean over the pieces of the data.
        square: float64 (rows,): the mean over the pieces of the square of each row's sum.
        pieces: How many there are; one alone does not tell how they differ.
        samples: How many are in all of them.

    Source:
        James and Stein 1961, "Estimation with quadratic loss", with one variance for all rows.

    >>> rows = torch.tensor([[4.0], [0.0]])
    >>> believed(rows, torch.tensor([32.0, 0.0]).double(), 2, 2)  # each seen in one piece of two, or in none
    tensor([[2.], [2.]])
    """
    sums = fisher.sum(1, dtype=torch.float64)
    spread = sums.var(correction=1) if len(sums) > 1 else sums.new_zeros(())
    share = PRIOR / (PRIOR + samples)
    if pieces > 1 and spread > 0:
        chance = (square - sums.square()).clamp(min=0).mean() / (pieces - 1)
        share = max(share, float((chance / spread).clamp(max=1.0)))
    return torch.lerp(fisher, fisher.mean(0, keepdim=True).expand_as(fisher), share)


def with_unseen(fisher: Tensor) -> Tensor:
    """Return E[g^2] of rows that are looked up, each as if it had been looked up once more than it was.

    Of words that a text shows, about half are in it once, so that one look is worth the median of the rows
    that were seen. One that was not seen is not known to be never needed.

    Args:
        fisher: (rows, columns), 0 for rows that no batch looks up.

    Source:
        Laplace's rule of succession, in units of one look; the share of words seen once: Zipf 1935.

    >>> with_unseen(torch.tensor([[4.0], [2.0], [2.0], [0.0]]))[:, 0]
    tensor([6., 4., 4., 2.])
    """
    sums = fisher.sum(1)
    seen = sums > 0
    if not seen.any():
        return fisher
    profile = fisher[seen].mean(0)
    return fisher + profile * (sums[seen].median() / profile.sum())


def _check_loss(value: Tensor, number: int) -> None:
    if not torch.isfinite(value):
        raise ArgumentError(
            f"the loss of calibration batch {number} is {float(value)}: sensitivities need finite "
            "losses. Check the batch and the weights."
        )


def output_divergence(output: Any, generator: torch.Generator | None = None) -> tuple[Tensor, int]:
    """Return a loss whose squared gradients are, on average, the curvature of the output's KL.

    For class scores the labels are drawn from the model's own softmax; any other output is taken as
    the mean of a normal distribution and drawn around. No labels are needed.

    Args:
        output: A tensor, a mapping with "logits", or a tuple whose first item is a tensor. Classes
            stand in the last dimension of two or three, in the second of more.
        generator: Draws; None: the default one.

    Returns:
        The mean loss a sample, and the number of samples.

    Raises:
        TypeError: If there is no floating tensor in the output.

    Source:
        KL(p || p + dp) = 1/2 dw F dw up to third order, F = E[g g^T] with labels from the model
        (Martens 2014, arXiv 1412.1193).
    """
    scores = first_tensor(output)
    samples = len(scores) if scores.dim() else 1
    axis = scores.dim() - 1 if scores.dim() <= 3 else 1
    if scores.dim() >= 2 and scores.shape[axis] > 1:
        logits = scores.movedim(axis, -1).reshape(-1, scores.shape[axis]).float()
        with torch.no_grad():
            labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
        return F.cross_entropy(logits, labels, reduction="sum") / samples, samples
    noise = torch.randn(scores.shape, generator=generator)
    return (scores.float() * noise.to(scores.device)).sum() / samples, samples


def first_tensor(output: Any) -> Tensor:
    """Return the tensor that judges a model's output: itself, its logits, or its first item."""
    value = output
    if isinstance(value, Mapping):
        value = value["logits"] if "logits" in value else next(iter(value.values()), None)
    elif isinstance(value, (tuple, list)):
        value = value[0] if value else None
    elif hasattr(value, "logits"):
        value = value.logits
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ArgumentTypeError(
            "sensitivities need an output with a floating tensor (itself, under 'logits', or first); "
            f"got {type(output).__name__}. Give quantize() a model that returns one."
        )
    return value


def row_losses(
    matrix: Tensor, fisher: Tensor, rounded: Callable[[int], Tensor], widths: Iterable[int]
) -> Tensor:
    """Return Omega(b) = 1/2 sum E[g^2] (w - Q_b(w))^2 of every row at every width.

    Args:
        matrix: Floating (rows, columns).
        fisher: E[g^2], of the same shape.
        rounded: Width -> the matrix on its grid of that width.
        widths: Those to evaluate.

    Returns:
        float64 (rows, 9); infinite at the widths left out.

    Source:
        Second-order loss of pruning, LeCun et al. 1990, for rounding errors.

    >>> row_losses(torch.tensor([[0.4]]), torch.tensor([[2.0]]), lambda b: torch.zeros(1, 1), [1])[0, 1]
    tensor(0.1600, dtype=torch.float64)
    """
    losses = torch.full((len(matrix), WIDTHS), torch.inf, dtype=torch.float64)
    for width in widths:
        error = rounded(width).float() - matrix.float()
        losses[:, width] = error.square_().mul_(fisher).sum(1).double() / 2
    return losses
