"""A float network that teaches while its quantized version is trained: a second loss, in the same backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from clipquant.quant.codes.paths import submodule
from clipquant.quant.network.wanted import are_logits, loss_of


class Tutor:
    """What a float network would have given for the same inputs, as a loss beside the module's own.

    The outputs of the outermost modules that a training step calls are compared: the whole network's, or
    its parts' where the step calls those. The loss joins the graph behind the outputs, so that one backward
    pass runs through both, and whatever wraps it (DDP, AMP, accumulation) sees one graph.

    Args:
        teacher: The float network, which is frozen and put in eval mode.
        weight: How much its loss counts.

    Source:
        Hinton et al. 2015, arXiv 1503.02531; Mishra and Marr 2017, arXiv 1711.05852 (with quantized pupils).
    """

    def __init__(self, teacher: nn.Module, weight: float) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight, self.factor, self.depth = weight, 1.0, 0
        self.kinds: dict[str, list[bool]] = {}  # of each module's outputs whether they are logits
        self.handles: list[RemovableHandle] = []

    def weigh(self, factor: float) -> None:
        """Take note, before a batch, of what its loss is multiplied by."""
        self.factor, self.depth = factor, 0

    def attach_(self, pupil: nn.Module) -> None:
        """Follow what a network computes from here on."""
        for name, module in pupil.named_modules():
            enter = module.register_forward_pre_hook(self._enter, with_kwargs=True)
            leave = module.register_forward_hook(self._leaver(name), with_kwargs=True)
            self.handles += [enter, leave]

    def detach_(self) -> None:
        """Follow it no more."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the network's state, and which outputs count as logits."""
        state = {name: t.detach().cpu() for name, t in self.teacher.state_dict().items()}
        return {"state": state, "kinds": dict(self.kinds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` gave."""
        if state:
            self.teacher.load_state_dict(state["state"])
            self.kinds = dict(state["kinds"])

    def _enter(self, _module: nn.Module, _args: Any, _kwargs: Any) -> None:
        self.depth += 1

    def _leaver(self, name: str) -> Any:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            self.depth -= 1
            if self.depth == 0 and module.training and torch.is_grad_enabled():
                return self._taught(name, args, kwargs, output)
            return output

        return leave

    def _taught(self, name: str, args: Any, kwargs: Any, output: Any) -> Any:
        """Return a module's output with the loss behind it."""
        leaves, spec = pytree.tree_flatten(output)
        places = [i for i, leaf in enumerate(leaves) if _counts(leaf)]
        if not places:
            return output
        with torch.no_grad():
            given = submodule(self.teacher, name)(*args, **kwargs)
        wanted = pytree.tree_leaves(given)
        pairs = [(leaves[i], wanted[i]) for i in places]
        if name not in self.kinds:
            self.kinds[name] = [are_logits(w) for _, w in pairs]
        own, want = zip(*pairs, strict=True)
        loss = loss_of(own, want, self.kinds[name], "auto") * (self.weight * self.factor)
        leaves[places[0]] = _Beside.apply(leaves[places[0]], loss)  # type: ignore[no-untyped-call]
        return pytree.tree_unflatten(leaves, spec)


class _Beside(torch.autograd.Function):
    """A tensor, unchanged, whose backward pass also runs through a loss."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor) -> Tensor:
        ctx.of_loss = torch.ones_like(loss)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return slopes[0], ctx.of_loss


def _counts(leaf: Any) -> bool:
    """Return whether an output is one of the network's, and no loss of its own."""
    return isinstance(leaf, Tensor) and leaf.requires_grad and leaf.dim() > 0
