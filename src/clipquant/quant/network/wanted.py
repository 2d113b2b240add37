"""What a network's outputs should be, batch by batch, and how far another's are from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from clipquant.errors import ArgumentError
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.decisions import Decisions
from clipquant.quant.network.outputs import distance, loss_in, outputs_and_return, tensors_of
from clipquant.quant.network.state import seeded
from clipquant.quant.network.twin import Twin, twin_of

Loss: TypeAlias = Literal["auto", "kl", "mse"]

_SURE = 0.5  # mean probability of the likeliest class from which outputs count as logits
_KEPT = (
    1 << 28
)  # bytes of wanted outputs kept for the next pass over the data; others are made anew


class Wanted:
    """The outputs wanted for each batch: the float network's, or a teacher's on the same inputs.

    Args:
        model: The float network, in eval mode.
        calibration: Batches, and how to run the model on them.
        last: Its module that stands for the output where there is no other; see `outputs_of`.
        teacher: Another network, which is left as it is; None: the float network's outputs are wanted.
        loss: How outputs are compared; see `loss_of`.
        seed: Of what a network draws while it runs, the same for both.
        labels: Whether the loss that the model computes of its own, by labels, counts as well.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        last: str,
        teacher: nn.Module | None = None,
        loss: Loss = "auto",
        seed: int = 0,
        labels: bool = False,
    ) -> None:
        self.exact, self.calibration, self.last = Twin(model), calibration, last
        self.loss, self.seed, self.labels = loss, seed, labels
        self.teacher: nn.Module | None = None
        if teacher is not None:
            own = next(iter(model.parameters()))
            self.teacher = twin_of(teacher).to(own.device).requires_grad_(False)
        self.kept: dict[int, tuple[list[Tensor], Decisions]] = {}
        self.kinds: list[bool] | None = None  # of each output whether it is of logits

    @property
    def judged(self) -> str:
        apart = len(self.calibration.apart)
        return (
            f"on {apart} batches held apart"
            if apart
            else "on all batches, too few to hold any apart"
        )

    def check_teacher(self) -> None:
        """Raise unless the teacher's outputs for the first batch have the shapes of the model's."""

        def visit(number: int, batch: Any) -> None:
            with torch.no_grad():
                own = [tuple(t.shape) for t in self._outputs(self.exact, number, batch)]
                theirs = [tuple(t.shape) for t in self._wanted(number, batch)[0]]
            if own != theirs:
                raise ArgumentError(
                    f"teacher must give outputs of the model's shapes, {own} for the first batch; got "
                    f"{theirs} of {type(self.teacher).__name__}. Give its outputs the model's form."
                )

        if self.teacher is not None:
            self.calibration.each(visit, [0])

    def check_labels(self) -> None:
        """Raise unless the model computes a loss of its own for the first batch, where it shall count."""

        def visit(number: int, batch: Any) -> None:
            with torch.no_grad():
                if self._run(self.exact, number, batch)[1] is None:
                    raise ArgumentError(
                        "labels=True trains on the module's own loss too, and running it returned none. Return the "
                        "loss from validation_step (without a Trainer: from forward(model, batch), or as an output), "
                        "or leave labels out."
                    )

        if self.labels:
            self.calibration.each(visit, [0])

    def error(self, twin: Twin, number: int, batch: Any) -> Tensor:
        """Return how far a network's outputs for a batch are from those wanted, and its own loss beside."""
        wanted, taken = self._wanted(number, batch)
        with taken.followed():
            own, loss = self._run(twin, number, batch)
        if self.kinds is None:
            self.kinds = [are_logits(w) for w in wanted]
        apart = loss_of(own, wanted, self.kinds, self.loss)
        return apart + loss.float() if self.labels and loss is not None else apart

    def mean_error(self, twin: Twin) -> float:
        """Return the mean over the batches held apart, or over all where there are none."""
        total = 0.0

        def visit(number: int, batch: Any) -> None:
            nonlocal total
            with torch.no_grad():
                total += float(self.error(twin, number, batch))

        numbers = self.calibration.apart or range(len(self.calibration))
        self.calibration.each(visit, numbers)
        return total / len(numbers)

    def _outputs(self, twin: Twin, number: int, batch: Any) -> list[Tensor]:
        return self._run(twin, number, batch)[0]

    def _run(self, twin: Twin, number: int, batch: Any) -> tuple[list[Tensor], Tensor | None]:
        """Return a network's outputs, and the loss that it computes of its own."""
        with seeded(self.seed + number):
            found, returned = outputs_and_return(twin, batch, self.calibration.forward, self.last)
        own = [t for t in found if t.dim()] or found  # a loss of its own is no output
        return own, loss_in(found, returned)

    def _wanted(self, number: int, batch: Any) -> tuple[list[Tensor], Decisions]:
        """Return the outputs wanted, and what the float network decided on the way."""
        if number in self.kept:
            return self.kept[number]
        taken, calls = Decisions(), list[tuple[Any, Any]]()
        hook = self.exact.model.register_forward_pre_hook(
            lambda _module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        try:
            with torch.no_grad(), taken.recorded():
                outputs = [t.detach().clone() for t in self._outputs(self.exact, number, batch)]
        finally:
            hook.remove()
        if self.teacher is not None:
            outputs = _taught(self.teacher, calls)
        kept = sum(t.nbytes for tensors, _ in self.kept.values() for t in tensors)
        if kept + sum(t.nbytes for t in outputs) <= _KEPT:
            self.kept[number] = outputs, taken
        return outputs, taken


def _taught(teacher: nn.Module, calls: Sequence[tuple[Any, Any]]) -> list[Tensor]:
    """Return a teacher's outputs for what the model's own `forward` was given."""
    if not calls:
        raise ArgumentError(
            "a teacher is run on what the model's own forward() is given, and it was never called. "
            "Let `forward` or validation_step call the model itself, or leave teacher out."
        )
    with torch.no_grad():
        found = [t for a, k in calls for t in tensors_of(teacher(*a, **k))]
    return [t.detach().clone() for t in found if t.dim()] or found


def are_logits(outputs: Tensor) -> bool:
    """Return whether outputs are taken for logits: their softmax is sure of one class, on average.

    >>> are_logits(torch.tensor([[4.0, 0.0], [0.0, 3.0]])), are_logits(torch.tensor([[0.1, 0.2, 0.1]]))
    (True, False)
    """
    if outputs.dim() < 2 or outputs.shape[-1] < 2 or not outputs.numel():
        return False
    return float(outputs.float().softmax(-1).amax(-1).mean()) >= _SURE


def loss_of(
    own: Sequence[Tensor], wanted: Sequence[Tensor], logits: Sequence[bool], loss: Loss
) -> Tensor:
    """Return how far outputs are from those wanted, the mean over the tensors; 0 where they are equal.

    Args:
        own: The network's.
        wanted: As many.
        logits: Of each whether it counts as logits with loss="auto".
        loss: "mse", "kl" or "auto".

    >>> round(float(loss_of([torch.zeros(1, 2)], [torch.tensor([[0.0, 9.0]])], [True], "kl")), 3)
    0.692
    """
    parts = []
    for o, w, are in zip(own, wanted, logits, strict=True):
        parts.append(distance([o], [w]) if loss != "kl" else o.new_zeros((), dtype=torch.float32))
        if loss == "kl" or (loss == "auto" and are):
            log_o, log_w = (t.float().log_softmax(-1) for t in (o, w))
            parts[-1] = parts[-1] + (log_w.exp() * (log_w - log_o)).sum(-1).mean()
    return torch.stack(parts).mean()
