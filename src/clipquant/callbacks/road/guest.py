"""The module that user code is run on: a deep copy proven independent, or the module itself put back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torchmetrics import Metric

from clipquant.callbacks.lightning import is_overridden, package_of
from clipquant.callbacks.road.silence import Silence, silently
from clipquant.quant.network.state import Trace, kept, things_of

_BUILDERS = ("prepare_data", "setup", "teardown", "configure_model", "configure_callbacks")
_HOOKS = (
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_validation_model_eval",
    "on_validation_model_train",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
)
_COMPILED = ("forward", "training_step", "validation_step", "test_step", "predict_step")

Probe = Callable[[Any], Any]  # runs something on a guest, returns what came of it


@contextmanager
def guest_of(
    module: pl.LightningModule, silence: Silence, probe: Probe
) -> Iterator[pl.LightningModule]:
    """Yield a module that can be run without a trace on `module`: a copy, or itself where a copy would not do.

    A copy serves only if it is independent: closures, hooks, compiled functions may stay bound to the
    original, and then the copy's weights are never run. So the copy runs once, watched; where it reads
    or writes anything of the original's, the original is used, and put back at the end.

    Args:
        module: Any LightningModule.
        silence: Gives stand-ins for loggers and their handles.
        probe: Runs a guest on a batch or so; what it returns must not depend on the original.
    """
    guest = _copied(module, silence)
    if guest is not None and independent(module, guest, probe):
        yield guest
        return
    with kept(module, parameters=True):
        silence.hush_(module)
        prepare_(module)
        yield module


def _copied(module: pl.LightningModule, silence: Silence) -> pl.LightningModule | None:
    try:
        guest = copy_module(module, silence.memo())
    except Exception:  # a lock, a file, a client: whatever its attributes' own copying raises
        return None
    prepare_(guest)
    return guest


def copy_module(
    module: pl.LightningModule, memo: dict[int, Any] | None = None
) -> pl.LightningModule:
    """Return a deep copy of a LightningModule that is attached to no Trainer and not compiled.

    Args:
        module: Any module; it is not changed.
        memo: As of `copy.deepcopy`: id of an object -> what stands for it in the copy.
    """
    memo = {**(memo or {}), **_detached(module)}
    with kept_attributes(module):
        module._trainer = None
        uncompile_(module)
        return copy.deepcopy(module, memo)


@contextmanager
def kept_attributes(module: pl.LightningModule) -> Iterator[None]:
    """Put the attributes of a module itself, not of its parts, back to what they were."""
    own, attributes = vars(module), dict(vars(module))
    try:
        yield
    finally:
        own.clear()
        own.update(attributes)


def _detached(module: nn.Module) -> dict[int, Tensor]:
    """Return copies of the tensors in a module's attributes that `copy.deepcopy` refuses: parts of a graph."""
    found: dict[int, Tensor] = {}
    for thing in things_of(module):
        held: Any = thing if isinstance(thing, (list, tuple)) else ()
        if isinstance(thing, dict):
            held = thing.values()
        elif isinstance(thing, nn.Module):
            held = vars(thing).values()
        graphs = (item for item in list(held) if isinstance(item, Tensor) and not item.is_leaf)
        found.update({id(item): item.detach().clone() for item in graphs})
    return found


def uncompile_(module: pl.LightningModule) -> None:
    """Give a module the plain steps that Lightning has compiled, as `Trainer.fit(torch.compile(module))` does."""
    context = getattr(module, "_compiler_ctx", None)
    if context is None:
        return
    module._compiler_ctx = None
    for name in _COMPILED:
        vars(module).pop(name, None)
        plain = context[f"original_{name}"]
        if getattr(plain, "__func__", None) is not getattr(type(module), name):
            setattr(module, name, plain)  # patched before it was compiled


def prepare_(guest: pl.LightningModule) -> None:
    """Let a module run aside: built already, silent, its metrics apart from other processes.

    A `setup` or `configure_model` run once more may make fresh layers.
    """
    base = package_of(guest).LightningModule
    uncompile_(guest)
    guest._trainer = None
    guest._metric_attributes = None  # names its metrics by id(): a copy has others
    for name in _BUILDERS:
        setattr(guest, name, getattr(base, name).__get__(guest))
    for name in _HOOKS:
        if is_overridden(name, guest):
            setattr(guest, name, silently(getattr(guest, name)))
    for part in guest.modules():
        vars(part).pop("_compiled_call_impl", None)
        if isinstance(part, Metric):
            part.distributed_available_fn = _no
        _normal_(part)


def _no() -> bool:
    return False


def _normal_(part: nn.Module) -> None:
    """Replace tensors that inference made, which nothing can learn from, by plain ones."""
    for held in (vars(part), part._buffers):
        if not isinstance(held, dict):  # a compiled script's own
            continue
        made = {k: t for k, t in held.items() if isinstance(t, Tensor) and t.is_inference()}
        held.update({name: tensor.clone() for name, tensor in made.items()})
    for parameter in part.parameters(recurse=False):
        if parameter.is_inference():
            parameter.data = parameter.data.clone()


def independent(original: pl.LightningModule, guest: pl.LightningModule, probe: Probe) -> bool:
    """Return whether a guest, run by `probe`, neither reads nor writes anything of the original's.

    Poisoning proves it: the original's weights are moved, which must not change what the guest gives;
    no module of the original's may be called, none of its attributes written; and the guest's own
    weights are moved, which must change what it gives.
    """
    theirs = {id(part) for part in original.modules()}
    if theirs & {id(part) for part in guest.modules()} or _share_tensors(original, guest):
        return False
    called = []

    def watch(part: nn.Module, _: Any) -> None:
        if id(part) in theirs:
            called.append(part)

    trace, handle = Trace(original), register_module_forward_pre_hook(watch)
    try:
        clean = probe(guest)
        with _moved(original):
            same = clean is None or _equal(probe(guest), clean)
        if called or not same or trace.changed():
            return False
        if clean is None:
            return True
        with _moved(guest):
            return not _equal(probe(guest), clean)
    except Exception:  # whatever the copy's code raises; the original may do better
        return False
    finally:
        handle.remove()


def _share_tensors(one: nn.Module, other: nn.Module) -> bool:
    held = {t.data_ptr() for t in (*one.parameters(), *one.buffers()) if t.numel()}
    return any(t.numel() and t.data_ptr() in held for t in (*other.parameters(), *other.buffers()))


@contextmanager
def _moved(module: nn.Module) -> Iterator[None]:
    """Give every floating parameter other values, mildly: user code must be able to run with them."""
    floats = [p for p in module.parameters() if p.is_floating_point()]
    values = [p.data for p in floats]
    try:
        for parameter, value in zip(floats, values, strict=True):
            parameter.data = value * 1.25 + 0.01
        yield
    finally:
        for parameter, value in zip(floats, values, strict=True):
            parameter.data = value


def _equal(one: Any, other: Any) -> bool:
    """Return whether two nestings of tensors and numbers are the same to the last bit, NaN included."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        with suppress(RuntimeError):
            return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other or (one != one and other != other))
