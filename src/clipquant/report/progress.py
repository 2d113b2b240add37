"""A bar for what takes long: the weight at work and the time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from clipquant.quant.calibrate import Progress

PATIENCE = 2.0  # seconds before a bar appears


@contextmanager
def progress_bar(shown: bool = True) -> Iterator[Progress]:
    """Give what quantizers tell their progress to; a bar shows it once it takes longer than 2 s.

    Args:
        shown: False: nothing is shown.

    >>> with progress_bar() as tell:
    ...     tell("fc1.weight", 0, 2)
    """
    bar = tqdm(
        total=0, desc="Quantizing", unit="step", delay=PATIENCE, leave=False, disable=not shown
    )

    def tell(name: str, done: int, total: int) -> None:
        if bar.total != total or done < bar.n:
            bar.reset(total)
        bar.set_description_str(f"Quantizing {name}", refresh=False)
        bar.update(done - bar.n)

    with bar:
        yield tell
