"""Figures with as many digits as say something."""

from __future__ import annotations

import math

_MOST = 6  # significant digits


def pair(before: float, after: float) -> tuple[str, str]:
    """Return a figure before and after, both with as many decimals as show by how much they differ.

    >>> pair(0.9639999866485596, 0.9599999785423279), pair(0.123456789, 0.123456798), pair(1234.5678, 1234.5)
    (('0.964', '0.960'), ('0.123457', '0.123457'), ('1234.57', '1234.50'))
    >>> pair(0.5, float("nan")), pair(2.5e-7, 2.0e-7)
    (('0.500', '-'), ('2.5e-07', '2e-07'))
    """
    largest = max((abs(v) for v in (before, after) if math.isfinite(v)), default=0.0)
    if largest and not 1e-3 <= largest < 1e7:
        return _short(before), _short(after)
    whole = math.floor(math.log10(largest)) if largest else 0
    places = max(3 - whole, 0)
    change = abs(before - after)
    if math.isfinite(change) and change > 0:
        places = min(max(places, 1 - math.floor(math.log10(change))), max(_MOST - 1 - whole, 0))
    said = [f"{v:.{places}f}" if math.isfinite(v) else "-" for v in (before, after)]
    if places > 3 and all(text == "-" or text.endswith("0") for text in said):
        said = [text if text == "-" else text[:-1] for text in said]
    return said[0], said[1]


def measured(value: float, error: float | None, digits: int = 4) -> str:
    """Return a figure with its standard error, where it has one, to the error's digits.

    Args:
        value: The figure.
        error: Its standard error; None: not known.
        digits: Of a figure without one.

    >>> measured(0.00312, 0.00104), measured(0.00312, None), measured(12.0, 3.4), measured(0.001, 0.0)
    ('0.0031 +- 0.0010', '0.00312', '12.0 +- 3.4', '0.001 +- 0')
    """
    if error is None or not (math.isfinite(value) and math.isfinite(error)):
        return f"{value:.{digits}g}"
    if error == 0:
        return f"{value:.{digits}g} +- 0"
    places = 1 - math.floor(math.log10(error))
    if places > 8:
        return f"{value:.{digits}g} +- {error:.2g}"
    return f"{value:.{max(places, 0)}f} +- {error:.{max(places, 0)}f}"


def change_said(drop: float, error: float | None = None, digits: int = 4) -> str:
    """Return in words by how much a metric got worse or better.

    >>> change_said(0.0), change_said(0.0031, 0.001), change_said(-0.25)
    ('unchanged', 'worse by 0.0031 +- 0.0010', 'better by 0.25')
    """
    if drop == 0 and not error:
        return "unchanged"
    return f"{'better' if drop < 0 else 'worse'} by {measured(abs(drop), error, digits)}"


def sure_said(sure: float) -> str:
    """Return how sure something is, never as more than it can be.

    >>> sure_said(0.876), sure_said(0.9999), sure_said(0.2)
    ('88 % sure', 'over 99 % sure', '20 % sure')
    """
    return f"{100 * sure:.0f} % sure" if sure < 0.995 else "over 99 % sure"


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def size(count: int) -> str:
    """Return bytes as people say them.

    >>> size(999), size(1_205_512), size(305_000)
    ('999 bytes', '1.21 MB', '305 kB')
    """
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= 0.9995 * unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} bytes"
