"""One display for what takes long: what is being done and the time left; lines, and few, where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from tqdm.auto import tqdm

from clipquant.quant.network.calibration import Progress

PATIENCE = 2.0  # seconds before a bar appears
PAUSE = 30.0  # seconds from one line to the next where there is no terminal
_LONGEST = 40  # characters of what is being done


class Bar(Protocol):
    """What shows steps done of steps in all: a tqdm bar, or something that acts like one."""

    n: Any
    total: Any

    def reset(self, total: Any = None) -> None: ...
    def set_description_str(self, desc: str | None = None, refresh: bool | None = True) -> None: ...
    def update(self, n: Any = 1) -> Any: ...
    def close(self) -> None: ...


@contextmanager
def progress_bar(
    shown: Progress | bool | Literal["lines"] = True, make: Callable[[], Bar] | None = None
) -> Iterator[Progress]:
    """Give what quantizers tell their progress to; it shows once it takes longer than 2 s.

    Args:
        shown: False: nothing is shown; "lines": a line now and then, as where there is no terminal; a function: it
            is told instead.
        make: Makes the bar; None: tqdm's.

    >>> with progress_bar() as tell:
    ...     tell("fc1.weight", 0, 2)
    """
    if callable(shown):
        yield shown
        return
    if not shown:
        yield _ignore
        return
    screen = _Live(make or _plain_bar) if shown is True and is_live() else _Lines()
    try:
        yield screen.tell
    finally:
        screen.close()


def is_live() -> bool:
    """Return whether what is shown can be updated in its place: on a terminal, or in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class _Live:
    """One bar for everything, made when it is worth it."""

    def __init__(self, make: Callable[[], Bar]) -> None:
        self.make, self.begun = make, time.monotonic()
        self.bar: Bar | None = None

    def tell(self, name: str, done: int, total: int) -> None:
        if self.bar is None:
            if time.monotonic() - self.begun < PATIENCE:
                return
            self.bar = self.make()
            self.bar.set_description_str(_said(name), refresh=False)
            self.bar.reset(total)
        if self.bar.total != total or done < self.bar.n:
            self.bar.reset(total)
        self.bar.set_description_str(_said(name), refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class _Lines:
    """A line now and then, so that a log tells that something is being done and not more."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def tell(self, name: str, done: int, total: int) -> None:
        if time.monotonic() - self.last >= PAUSE:
            self.last = time.monotonic()
            print(f"{_said(name)}, {done} of {total}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing stays open."""


def _said(name: str) -> str:
    short = name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}"
    return f"Quantizing: {short}"


def _plain_bar() -> Bar:
    bar: Bar = tqdm(unit="step", leave=False, dynamic_ncols=True)
    return bar


def _ignore(name: str, done: int, total: int) -> None:
    """Show nothing."""
