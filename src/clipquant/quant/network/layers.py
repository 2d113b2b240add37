"""Which parameters of a model can be quantized, how each folds into rows, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from clipquant.errors import ArgumentError
from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.paths import submodule
from clipquant.quant.codes.weights import LeftInFloat, check_storable
from clipquant.quant.network.kinds import REBUILT, layouts

LOOKUPS = (nn.Embedding, nn.EmbeddingBag)

Globs: TypeAlias = Iterable[str] | None


@dataclass(frozen=True)
class Target:
    """A weight to quantize: its key in the state dict, its module and its layout.

    Args:
        name: Key of the weight in the model's state dict.
        module: The module that holds it.
        attribute: Its name in that module.
        layout: How it folds into rows.
    """

    name: str
    module: nn.Module
    attribute: str
    layout: Layout

    @property
    def weight(self) -> Tensor:
        weight: Tensor = getattr(self.module, self.attribute)
        return weight


@dataclass(frozen=True)
class Selection:
    """What of a model is quantized, what stays in float, and which keys are the same tensor.

    Args:
        targets: The weights to quantize, in the order of the state dict, each tensor once.
        left: Every other floating tensor.
        aliases: Key of a tied tensor -> the key under which it is held.
    """

    targets: tuple[Target, ...]
    left: tuple[LeftInFloat, ...]
    aliases: dict[str, str]

    def without(self, reasons: Mapping[str, str]) -> Selection:
        """Return the selection without some of its targets: name -> why it stays in float."""
        kept = tuple(target for target in self.targets if target.name not in reasons)
        left = tuple(
            LeftInFloat(target.name, target.weight.nbytes, reasons[target.name])
            for target in self.targets
            if target.name in reasons
        )
        return replace(self, targets=kept, left=(*self.left, *left))


def select(model: nn.Module, include: Globs = None, exclude: Globs = None) -> Selection:
    """Return which weights of a model are quantized; everything else is listed with its reason.

    Args:
        model: Any module.
        include: Globs over state-dict keys; None: all.
        exclude: Globs over state-dict keys that stay in float.

    Raises:
        ValueError: If a glob matches no parameter, or nothing is left to quantize.

    >>> [t.name for t in select(nn.Sequential(nn.Linear(2, 3), nn.ReLU())).targets]
    ['0.weight']
    """
    held = model.state_dict(keep_vars=True).items()
    state = {k: v for k, v in held if isinstance(v, Tensor) and not is_lazy(v)}
    check_storable(state)
    check_globs(state, include=include, exclude=exclude)
    aliases = tied_keys(state)
    candidates = {target.name: target for target in weights_of(model)}
    if include is not None or not candidates:
        own = {
            t.name: t for t in unknown_weights(model) if include is None or matches(t.name, include)
        }
        candidates = own | candidates
    targets, left = [], []
    for name, tensor in state.items():
        if name in aliases:
            continue
        target = candidates.get(name) or _through_alias(name, aliases, candidates)
        why = _why_left(name, tensor, target, model, include, exclude)
        if why is None and target is not None:
            targets.append(target)
        elif tensor.is_floating_point() or tensor.is_complex():
            left.append(LeftInFloat(name, tensor.nbytes, why or "not a weight of a known layer"))
    if not targets:
        raise ArgumentError(_nothing(left, include, exclude))
    return Selection(tuple(targets), tuple(left), aliases)


def weights_of(model: nn.Module) -> Iterator[Target]:
    """Yield every weight of every layer kind that can be quantized, with its layout."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for attribute, layout in layouts(module):
            yield Target(prefix + attribute, module, attribute, layout)


def unknown_weights(model: nn.Module) -> Iterator[Target]:
    """Yield the parameters of two axes or more that no known layer holds, rows along the first.

    A layer of another library, or of the user's own, may be a Linear by another name; naming its
    weight in `include` says that it is one.
    """
    known = {target.name for target in weights_of(model)}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            name = f"{path}.{attribute}" if path else attribute
            if parameter is None or name in known or is_lazy(parameter):
                continue
            if parameter.dim() >= 2 and not name.endswith(REBUILT):
                yield Target(name, module, attribute, Layout(tuple(parameter.shape)))


def tied_keys(state: dict[str, Tensor]) -> dict[str, str]:
    """Return, for each key whose tensor an earlier key holds already, that earlier key."""
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name, tensor in state.items():
        if tensor.numel() == 0:
            continue
        place = tensor.data_ptr() or id(tensor)  # on "meta" there is no storage to share
        where = (place, tensor.shape, tensor.stride(), tensor.dtype)
        if first.setdefault(where, name) != name:
            aliases[name] = first[where]
    return aliases


def check_globs(names: Iterable[str], **globs: Globs) -> None:
    """Raise for a glob that matches none of the names, showing some of them.

    >>> check_globs(["fc.weight"], exclude=["conv*"])
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: exclude=['conv*'] matches no parameter. The model's are: fc.weight.
    """
    names = list(names)
    for argument, patterns in globs.items():
        if isinstance(patterns, str):
            raise ArgumentError(f"{argument} must be a list of globs; got the string {patterns!r}.")
        for pattern in patterns or []:
            if not any(fnmatchcase(name, pattern) for name in names):
                shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise ArgumentError(
                    f"{argument}=[{pattern!r}] matches no parameter. The model's are: {shown}."
                )


def matches(name: str, patterns: Globs) -> bool:
    """Return whether a name matches any of the globs."""
    return any(fnmatchcase(name, pattern) for pattern in patterns or [])


def _through_alias(
    name: str, aliases: dict[str, str], candidates: dict[str, Target]
) -> Target | None:
    """Return the layer that holds a tensor under another key, as a decoder tied to an embedding."""
    for alias, held in aliases.items():
        if held == name and alias in candidates:
            target = candidates[alias]
            return Target(name, target.module, target.attribute, target.layout)
    return None


def _why_left(
    name: str,
    tensor: Tensor,
    target: Target | None,
    model: nn.Module,
    include: Globs,
    exclude: Globs,
) -> str | None:
    if target is None:
        return _why_unknown(name, tensor, model)
    if matches(name, exclude):
        return "excluded"
    if include is not None and not matches(name, include):
        return "not included"
    if not tensor.is_floating_point():
        return f"dtype {tensor.dtype} has no grid"
    if tensor.numel() == 0:
        return "empty"
    return None


def _why_unknown(name: str, tensor: Tensor, model: nn.Module) -> str:
    path, _, leaf = name.rpartition(".")
    if ".parametrizations." in f".{path}.":
        return "parametrized: remove_parametrizations() first, then it is a plain weight"
    if (
        leaf.endswith("_mask")
        and f"{leaf.removesuffix('_mask')}_orig" in submodule(model, path)._parameters
    ):
        return "a mask of pruning: prune.remove() first, then it is gone"
    if leaf.endswith(REBUILT):
        owner = submodule(model, path)
        if owner._forward_pre_hooks or parametrize.is_parametrized(owner):
            return (
                "rebuilt before each forward (pruning, weight or spectral norm): remove that first"
            )
    if tensor.dim() < 2:
        return "bias, normalization or other vector"
    kind = type(submodule(model, path)).__name__
    return f"{kind} is not a layer that is quantized unless its weight is named in include"


def _nothing(left: list[LeftInFloat], include: Globs, exclude: Globs) -> str:
    kept = (
        "; ".join(f"{item.name} ({item.why})" for item in left[:5]) or "no floating tensor at all"
    )
    return (
        "the model has no weight to quantize: Conv, ConvTranspose, Linear, Bilinear, Embedding, attention, "
        f"recurrent and stacked experts' weights are; got include={include}, exclude={exclude} and {kept}. "
        "Widen include or narrow exclude."
    )


def bias_of(model: nn.Module, target: Target) -> str | None:
    """Return the name of the bias that is added to a weight's outputs alone, if there is one."""
    name = target.attribute.replace("weight", "bias")
    module = submodule(model, target.name.rpartition(".")[0])
    if name == target.attribute or name.startswith(("q_", "k_", "v_", "bias_hr")):
        return None
    return name if module._parameters.get(name) is not None else None


def is_lookup(model: nn.Module, target: Target) -> bool:
    """Return whether a weight is looked up, and so multiplies with nothing."""
    module = submodule(model, target.name.rpartition(".")[0])
    return isinstance(module, LOOKUPS)


def lookups_of(model: nn.Module, targets: Iterable[Target]) -> frozenset[str]:
    """Return the names of the weights that are looked up."""
    return frozenset(target.name for target in targets if is_lookup(model, target))


def check_finite(targets: Iterable[Target]) -> None:
    """Raise for weights that hold NaN or infinity, naming every such tensor and its count."""
    bad = []
    for target in targets:
        low, high = target.weight.detach().aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            count = int((~torch.isfinite(target.weight)).sum())
            bad.append(f"{target.name} ({count} of {target.weight.numel()})")
    if bad:
        raise ArgumentError(
            f"weights must be finite to have a grid; NaN or infinity in {', '.join(bad)}. "
            "Train with a smaller step or clipped gradients, or exclude these weights."
        )
