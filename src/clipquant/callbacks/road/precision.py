"""In which precision a Trainer runs steps: autocast and the default dtype, taken off and put on again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """What torch computes in.

    Args:
        default: The default dtype.
        casts: Kind of device -> the dtype that autocast takes, None where it is off.
    """

    default: torch.dtype
    casts: tuple[tuple[str, torch.dtype | None], ...]

    @classmethod
    def now(cls, device: str = "cpu") -> Precision:
        """Return the precision in force, on the CPU and a kind of device.

        >>> Precision.now() == PLAIN
        True
        """
        kinds = dict.fromkeys(("cpu", device))
        return cls(torch.get_default_dtype(), tuple((kind, _cast(kind)) for kind in kinds))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute in this precision for a time."""
        before = torch.get_default_dtype()
        with ExitStack() as stack:
            for kind, dtype in self.casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=dtype is not None))
            torch.set_default_dtype(self.default)
            try:
                yield
            finally:
                torch.set_default_dtype(before)


def _cast(kind: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


PLAIN = Precision(torch.float32, (("cpu", None),))
