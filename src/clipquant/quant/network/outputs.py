"""What a model gives for a batch, and how far two models' outputs are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clipquant.errors import ArgumentTypeError
from clipquant.quant.codes.paths import submodule
from clipquant.quant.network.calibration import Calibration, Forward
from clipquant.quant.network.decisions import Decisions
from clipquant.quant.network.twin import Twin


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the floating tensors of an output: a tensor, or any nesting of sequences and mappings of them.

    >>> [t.shape for t in tensors_of({"logits": torch.ones(2, 3), "ids": torch.ones(2).long()})]
    [torch.Size([2, 3])]
    """
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)


def outputs_of(twin: Twin, batch: Any, forward: Forward, last: str) -> list[Tensor]:
    """Return the tensors that judge a model on a batch; see `outputs_and_return`."""
    return outputs_and_return(twin, batch, forward, last)[0]


def outputs_and_return(
    twin: Twin, batch: Any, forward: Forward, last: str
) -> tuple[list[Tensor], Any]:
    """Return the tensors that judge a model on a batch, and what running it returned.

    They are what the model's own `forward` returns when `forward(model, batch)` calls it, however
    often; else what its module `last` returns.

    Raises:
        TypeError: If neither gives a floating tensor.
    """
    whole: list[Tensor] = []
    ends: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _m, _a, out, seen=seen: seen.extend(tensors_of(out)))
        for module, seen in ((twin.model, whole), (submodule(twin.model, last), ends))
    ]
    try:
        returned = twin.run(forward, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not whole and not ends:
        raise ArgumentTypeError(
            "learned rounding compares outputs, and the model returned no floating tensor for a batch "
            f"({type(batch).__name__}). Let forward() return one, or choose method='gptq'."
        )
    return whole or ends, returned


def loss_in(outputs: Sequence[Tensor], returned: Any) -> Tensor | None:
    """Return the loss that a model computes of its own: a number returned, or among its outputs.

    Args:
        outputs: The model's.
        returned: What running it returned.

    >>> loss_in([torch.ones(2, 3)], {"loss": torch.tensor(0.5)})
    tensor(0.5000)
    """
    held = returned.get("loss") if isinstance(returned, Mapping) else returned
    found = [t for t in (*tensors_of(held), *outputs) if t.dim() == 0]
    return found[0] if found else None


def distances(
    exact: Twin, others: Sequence[Twin], calibration: Calibration, last: str
) -> list[float]:
    """Return how far the outputs of some twins are from those of the float network.

    Batches that nothing was fitted to are run, or all where there are too few to hold some apart.

    Args:
        exact: The float network.
        others: What is compared with it.
        calibration: Batches, and how to run them.
        last: The module that stands for the output where there is no other; see `outputs_of`.

    Returns:
        For each of the others the mean of `distance` over the batches.
    """
    totals: list[Tensor | float] = [0.0] * len(others)

    def visit(_number: int, batch: Any) -> None:
        with torch.no_grad():
            taken = Decisions()
            with taken.recorded():
                wanted = outputs_of(exact, batch, calibration.forward, last)
            for i, twin in enumerate(others):
                with taken.followed():
                    own = outputs_of(twin, batch, calibration.forward, last)
                totals[i] = totals[i] + distance(own, wanted)

    numbers = calibration.apart or range(len(calibration))
    calibration.each(visit, numbers)
    return [float(total) / len(numbers) for total in totals]


def distance(own: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return the mean squared difference of outputs as a share of the variance of those wanted.

    >>> distance([torch.tensor([0.0, 2.0])], [torch.tensor([1.0, -1.0])])
    tensor(5.)
    """
    parts = [
        (o.float() - w.float()).square().mean() / w.float().var(correction=0).clamp(min=1e-12)
        for o, w in zip(own, wanted, strict=True)
    ]
    return torch.stack(parts).mean()
