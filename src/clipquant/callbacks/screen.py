"""The one display of what is done at a fit's end, as the user's own progress bar looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl

from clipquant.callbacks.lightning import package_of
from clipquant.quant.network.calibration import Progress
from clipquant.report.progress import Bar, progress_bar


@contextmanager
def display(trainer: pl.Trainer) -> Iterator[Progress]:
    """Yield what is told of every step: a bar of the Trainer's own kind; lines, and few, where it shows none.

    Args:
        trainer: One whose training is over; its own bar ends.
    """
    bar = trainer.progress_bar_callback
    callbacks = package_of(trainer).callbacks
    shown: bool | Literal["lines"]
    make: Callable[[], Bar] | None = None
    if not trainer.is_global_zero:
        shown = False
    elif bar is None:
        shown = "lines"
    elif isinstance(bar, callbacks.RichProgressBar):
        bar.teardown(
            trainer, trainer.lightning_module, "fit"
        )  # rich holds one live display at a time
        shown, make = True, _RichBar
    elif isinstance(bar, callbacks.TQDMProgressBar):
        shown, make = True, partial(_tqdm_like, bar)
    else:
        shown = True
    with progress_bar(shown, make) as tell:
        yield tell


def _tqdm_like(callback: Any) -> Bar:
    """Return a bar as a user's class of progress bar makes them, that leaves nothing behind."""
    kind = type(callback)
    named = type(kind.__name__, (kind,), {"predict_description": "Quantizing"})
    twin: Any = object.__new__(
        named
    )  # tells from the first what is done, and leaves the user's own as it is
    vars(twin).update(vars(callback))
    bar: Bar = twin.init_predict_tqdm()
    bar.leave = False  # type: ignore[attr-defined]
    return bar


class _RichBar:
    """A bar of rich that acts as one of tqdm does."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.n, self.total = 0, None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, transient=True)
        self.task = self.progress.add_task("Quantizing", total=None)
        self.progress.start()

    def reset(self, total: Any = None) -> None:
        self.n, self.total = 0, total
        self.progress.reset(self.task, total=total)

    def set_description_str(self, desc: str | None = None, refresh: bool | None = True) -> None:
        from rich.markup import escape

        self.progress.update(self.task, description=escape(desc or ""), refresh=bool(refresh))

    def update(self, n: Any = 1) -> None:
        self.n += n
        self.progress.update(self.task, completed=self.n)

    def close(self) -> None:
        self.progress.stop()
