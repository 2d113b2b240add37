"""Names as short as they may be and still be told apart."""

from __future__ import annotations

import re
from collections.abc import Sequence


def distinct(names: Sequence[str], signs: str = ".", ends: bool = True) -> list[str]:
    r"""Return names without the parts that all of them begin and end with; a lone name as its last part.

    Args:
        names: Of weights, or of files with `signs="/\\"`.
        signs: What their parts are joined by.
        ends: Whether what all end with goes too.

    >>> distinct(["net.encoder.0.weight", "net.encoder.1.weight", "net.head.weight"])
    ['encoder.0', 'encoder.1', 'head']
    >>> distinct(["runs/a/model.safetensors", "runs/b/model.safetensors"], "/"), distinct(["runs/a.onnx"], "/")
    (['a', 'b'], ['a.onnx'])
    """
    parts = [re.split(f"[{re.escape(signs)}]", name) for name in names]
    if len(set(names)) < 2:
        return [name[-1] for name in parts]
    shortest = min(map(len, parts))
    start = next(i for i in range(shortest + 1) if i == shortest or _differ(parts, i))
    start = min(start, shortest - 1)
    most = shortest - start if ends else 1
    end = next(i for i in range(1, most + 1) if i == most or _differ(parts, -i))
    cut = [name[start : len(name) - end + 1] for name in parts]
    return [signs[0].join(name) for name in cut]


def _differ(parts: Sequence[Sequence[str]], place: int) -> bool:
    return len({name[place] for name in parts}) > 1
