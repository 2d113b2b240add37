"""Engines that keep a module's tensors in parts, one process each: how a whole one is read, and written back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipquant.quant.network.bare import bare

Unit = tuple[str, ...]  # keys of tensors that are gathered together


class Engine(Protocol):
    """What keeps tensors in parts. Every process makes the same calls in the same order."""

    @property
    def units(self) -> Sequence[Unit]:
        """What is gathered at once, largest first, the same in every process."""
        ...

    @property
    def blanks(self) -> Mapping[str, Tensor]:
        """Key -> the whole tensor's shape and dtype, as a tensor on "meta"."""
        ...

    def whole(self, unit: Unit) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Yield the whole tensors of a unit, in every process, to be copied by whoever needs them."""
        ...

    def write_(self, unit: Unit, values: Mapping[str, Tensor]) -> None:
        """Put whole values, given in every process, in the place of some of a unit's tensors."""
        ...


def engine_of(trainer: pl.Trainer, module: pl.LightningModule) -> Engine | None:
    """Return what keeps a module's tensors in parts; None where every process has whole ones.

    Args:
        trainer: A Trainer whose strategy is set up, and not torn down.
        module: Its module.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    held = [*module.parameters(), *module.buffers()]
    model = trainer.strategy.model
    if any(isinstance(part, FullyShardedDataParallel) for part in (model or module).modules()):
        return FlatEngine(model or module, module)
    if any(isinstance(tensor, DTensor) for tensor in held):
        return MeshEngine(module)
    return None


class MeshEngine:
    """Distributed tensors: FSDP2 (`fully_shard`), tensor parallelism, and both."""

    def __init__(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # a forward pass may have left it whole
        with bare(module):
            self.parts = {k: t for k, t in named_tensors(module) if isinstance(t, DTensor)}
            self._owners = {key: module.get_submodule(key.rpartition(".")[0]) for key in self.parts}
        self.blanks: Mapping[str, Tensor] = {
            k: _blank(t.shape, t.dtype) for k, t in self.parts.items()
        }
        self.units: Sequence[Unit] = _largest_first([(key,) for key in self.parts], self.blanks)

    @contextmanager
    def whole(self, unit: Unit) -> Iterator[Mapping[str, Tensor]]:
        yield {key: self._whole(self.parts[key]) for key in unit}

    def _whole(self, part: Any) -> Tensor:
        with torch.no_grad():  # parts kept in host memory travel by the mesh's own device
            if part.device.type != part.device_mesh.device_type:
                part = part.detach().to(part.device_mesh.device_type)
            tensor: Tensor = part.detach().full_tensor()
            return tensor

    def write_(self, unit: Unit, values: Mapping[str, Tensor]) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=True, strict=False)  # each takes its part
        for key, value in values.items():
            name = key.rpartition(".")[2]
            value = value.to(self.parts[key].device, self.parts[key].dtype)
            set_model_state_dict(self._owners[key], {name: value}, options=options)


class FlatEngine:
    """FSDP's flat parameters: a wrapped part is gathered at a time, as it is for a forward pass.

    Args:
        root: The outermost wrapper, or what holds it.
        module: The module whose keys count.
    """

    def __init__(self, root: nn.Module, module: nn.Module) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        with bare(module):
            names = {id(tensor): key for key, tensor in module.named_parameters()}
        self._wrappers: dict[Unit, nn.Module] = {}
        self._tensors: dict[str, Tensor] = {}
        for wrapper in root.modules():
            if isinstance(wrapper, FullyShardedDataParallel):
                own = {names[id(p)]: p for p in _own_parameters(wrapper) if id(p) in names}
                own = {key: p for key, p in own.items() if key not in self._tensors}
                if own:
                    self._tensors |= own
                    self._wrappers[tuple(own)] = wrapper
        blanks: dict[str, Tensor] = {}
        for unit in self._wrappers:
            with self.whole(unit) as found:
                blanks |= {key: _blank(t.shape, t.dtype) for key, t in found.items()}
        self.blanks: Mapping[str, Tensor] = blanks
        self.units: Sequence[Unit] = _largest_first(list(self._wrappers), self.blanks)

    @contextmanager
    def whole(self, unit: Unit) -> Iterator[Mapping[str, Tensor]]:
        with self._open(unit, writeback=False):
            yield {key: self._tensors[key].detach() for key in unit}

    def write_(self, unit: Unit, values: Mapping[str, Tensor]) -> None:
        with self._open(unit, writeback=True), torch.no_grad():
            for key, value in values.items():
                self._tensors[key].copy_(value)

    def _open(self, unit: Unit, *, writeback: bool) -> AbstractContextManager[None]:
        from torch.distributed.fsdp import FullyShardedDataParallel

        opened: AbstractContextManager[None] = FullyShardedDataParallel.summon_full_params(
            self._wrappers[unit], recurse=False, writeback=writeback
        )
        return opened


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a module with their keys, each once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _own_parameters(wrapper: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters that a wrapper gathers itself: those of the wrappers inside it are theirs."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    parts = list(wrapper.children())
    for part in parts:  # grows meanwhile
        if not isinstance(part, FullyShardedDataParallel):
            yield from (p for p in part._parameters.values() if p is not None)
            parts.extend(part.children())


def _blank(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _largest_first(units: Sequence[Unit], blanks: Mapping[str, Tensor]) -> list[Unit]:
    """Return units by size, so that processes that take neighbouring ones have as much to do."""
    return sorted(units, key=lambda unit: (-sum(blanks[key].numel() for key in unit), unit))
