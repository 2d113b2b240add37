"""Tensors that are kept in parts: gathered a layer at a time, worked on by all processes, and written back."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from clipquant.callbacks.road.engines import Engine, Unit

T = TypeVar("T")


@dataclass(frozen=True)
class Missed:
    """What came of a tensor on which the work failed.

    Args:
        why: The error.
    """

    why: str


def gather(
    engine: Engine,
    keep: Callable[[str], bool],
    work: Callable[[str, Tensor], Any],
    wanted: Container[str] = (),
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return, in the first process, whole tensors in host memory and what the work on some of them came to.

    Each process works on as many tensors as the others and holds one whole layer at a time; only results
    travel. What fails on one tensor fails on it alone: no process leaves the others waiting.

    Args:
        engine: What keeps the tensors in parts.
        keep: Whether the first process keeps the whole tensor of a key.
        work: Called with a key and the whole tensor, in one process.
        wanted: The keys that are worked on.

    Returns:
        Key -> whole tensor, and key -> result, or `Missed`; both empty in every process but the first.
    """
    kept: dict[str, Tensor] = {}
    done: dict[str, Any] = {}
    rank = dist.get_rank()
    for units in rounds(engine.units, dist.get_world_size()):
        mine: dict[str, Tensor] = {}
        for owner, unit in enumerate(units):
            with engine.whole(unit) as tensors:
                for key, tensor in tensors.items():
                    if rank == 0 and keep(key):
                        kept[key] = tensor.detach().to("cpu", copy=True)
                    if rank == owner and key in wanted:
                        mine[key] = tensor.detach().clone()
        found = {key: _tried(work, key, mine.pop(key)) for key in list(mine)}
        done |= _brought(found, len(units))
    return kept, done


def rounds(units: Sequence[Unit], count: int) -> Iterator[Sequence[Unit]]:
    """Yield units, one for each process at a time.

    >>> list(rounds([("a",), ("b",), ("c",)], 2))
    [[('a',), ('b',)], [('c',)]]
    """
    for start in range(0, len(units), count):
        yield units[start : start + count]


def _tried(work: Callable[[str, Tensor], Any], key: str, tensor: Tensor) -> Any:
    try:
        return work(key, tensor)
    except Exception as error:  # whatever a layer or a method raises: the others wait for an answer
        return Missed(f"{type(error).__name__}: {error}")


def _brought(found: T, senders: int) -> dict[str, Any]:
    """Return in the first process what the first so many processes have found."""
    rank = dist.get_rank()
    if rank >= senders:
        return {}
    if rank > 0:
        dist.send_object_list([found], dst=0)
        return {}
    brought: Any = found
    for sender in range(1, senders):
        held: list[Any] = [None]
        dist.recv_object_list(held, src=sender)
        brought = brought | held[0]
    return dict(brought)


def write_back_(
    engine: Engine,
    local: Mapping[str, Tensor],
    keys: Container[str],
    value: Callable[[str], Any],
    opened: Callable[[Any], Tensor],
) -> list[str]:
    """Put values that the first process has into the tensors of all processes, a layer at a time.

    Args:
        engine: What keeps tensors in parts.
        local: Key -> tensor of which each process has the whole.
        keys: Keys of what is written, the same in every process.
        value: Returns, in the first process, what travels for a key.
        opened: Returns the tensor that it stands for.

    Returns:
        What failed in this process, in words.
    """
    failed = []
    for unit in [*engine.units, *((key,) for key in local)]:
        own = [key for key in unit if key in keys]
        if not own:
            continue
        held = [{key: value(key) for key in own} if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(held, src=0)
        values = {key: opened(item) for key, item in (held[0] or {}).items()}
        try:
            if unit in engine.units:
                engine.write_(unit, values)
            else:
                for key, tensor in values.items():
                    local[key].detach().copy_(tensor)
        except Exception as error:  # the others have written theirs; this one goes on with them
            failed.append(f"{', '.join(own)}: {type(error).__name__}: {error}")
    return failed
