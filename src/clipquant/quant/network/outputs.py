"""What a model gives for a batch, and how far two models' outputs are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipquant.quant.network.calibration import Forward


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


def outputs_of(model: nn.Module, batch: Any, forward: Forward, last: nn.Module) -> list[Tensor]:
    """Return the tensors that judge a model on a batch.

    They are what the model's own `forward` returns when `forward(model, batch)` calls it, however
    often; else what the module `last` returns.

    Raises:
        TypeError: If neither gives a floating tensor.
    """
    whole: list[Tensor] = []
    ends: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _m, _a, out, found=found: found.extend(tensors_of(out)))
        for module, found in ((model, whole), (last, ends))
    ]
    try:
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not whole and not ends:
        raise TypeError(
            "learned rounding compares outputs, and the model returned no floating tensor for a batch "
            f"({type(batch).__name__}). Let forward() return one, or choose method='gptq'."
        )
    return whole or ends


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return the mean squared difference of outputs as a share of the variance of those wanted.

    >>> distance([torch.tensor([0.0, 2.0])], [torch.tensor([1.0, -1.0])])
    tensor(5.)
    """
    parts = [
        (f.float() - w.float()).square().mean() / w.float().var(correction=0).clamp(min=1e-12)
        for f, w in zip(found, wanted, strict=True)
    ]
    return torch.stack(parts).mean()
