"""Several processes: each runs user code as if alone, all tell each other how it ended, none waits in vain."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

_PAUSE = 0.05  # seconds between two looks at who has arrived
_numbers = count()


def several() -> bool:
    """Return whether this process is one of several that talk to each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def alone() -> Iterator[None]:
    """Let every collective of user code meet this process alone.

    All processes run the same steps on the same data. A collective in a step would add up what is the same
    thing in each, and where one process fails it would keep the others waiting. So the default group is one
    of this process for the time; every function of `torch.distributed` works as in a run on one device.
    """
    if not several():
        yield
        return
    import torch.distributed.distributed_c10d as c10d

    default = c10d._get_default_group()
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    c10d._update_default_pg(group)
    try:
        yield
    finally:
        c10d._update_default_pg(default)
        with suppress(Exception):  # a group that is gone already
            dist.destroy_process_group(group)


def meet() -> None:
    """Wait until every process has come here, however long it takes; no collective times out meanwhile.

    A process that has died takes the store with it or its launcher ends the others, so nobody waits for it.
    """
    if not several():
        return
    import torch.distributed.distributed_c10d as c10d

    store, number = c10d._get_default_store(), next(_numbers)
    store.set(f"clipquant/{number}/{dist.get_rank()}", "here")
    for rank in range(dist.get_world_size()):
        while not store.check([f"clipquant/{number}/{rank}"]):
            if store.check([f"clipquant/left/{rank}"]):
                raise RuntimeError(f"process {rank} has left before the others were done")
            time.sleep(_PAUSE)


@contextmanager
def leaving() -> Iterator[None]:
    """Tell the others where this process leaves by an exception: they wait for it no longer."""
    try:
        yield
    except BaseException:
        if several():
            import torch.distributed.distributed_c10d as c10d

            with suppress(Exception):  # the others may be gone
                c10d._get_default_store().set(f"clipquant/left/{dist.get_rank()}", "gone")
        raise


def gathered(value: T) -> list[T]:
    """Return what each process has, in the order of their ranks, once all have come."""
    if not several():
        return [value]
    meet()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def from_first(value: T) -> T:
    """Return what the first process has, once all have come."""
    if not several():
        return value
    meet()
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]
