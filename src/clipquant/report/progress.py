"""A bar for what takes long: the weight at work and the time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from clipquant.quant.network.calibration import Progress

PATIENCE = 2.0  # seconds before a bar appears


@contextmanager
def progress_bar(shown: Progress | bool = True) -> Iterator[Progress]:
    """Give what quantizers tell their progress to; a bar shows it once it takes longer than 2 s.

    Args:
        shown: False: nothing is shown; a function: it is told instead.

    >>> with progress_bar() as tell:
    ...     tell("fc1.weight", 0, 2)
    """
    if callable(shown):
        yield shown
        return
    begun = time.monotonic()
    bar: tqdm | None = None

    def tell(name: str, done: int, total: int) -> None:
        nonlocal bar
        if bar is None or bar.total != total or done < bar.n:
            if bar is not None:
                bar.close()
            patience = max(PATIENCE - (time.monotonic() - begun), 1e-3)
            bar = tqdm(total=total, unit="step", delay=patience, leave=False, disable=not shown)
        bar.set_description_str(f"Quantizing {name}", refresh=False)
        bar.update(done - bar.n)

    try:
        yield tell
    finally:
        if bar is not None:
            bar.close()
