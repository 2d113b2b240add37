"""How a model is quantized: which of its weights, on which grids, by which method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from clipquant.quant.codes.spec import QuantSpec, check_bits
from clipquant.quant.network.layers import Target, check_globs

METHODS = ("auto", "rtn", "mse", "hqq", "gptq", "adaround")


CALIBRATED = ("gptq", "adaround")  # these need data


def check_method(method: str, known: Sequence[str] = METHODS) -> None:
    """Raise unless `method` is a known one.

    >>> check_method("awq")
    Traceback (most recent call last):
    ...
    ValueError: method must be one of 'auto', 'rtn', 'mse', 'hqq', 'gptq', 'adaround'; got 'awq'.
    """
    if method not in known:
        raise ValueError(f"method must be one of {', '.join(map(repr, known))}; got {method!r}.")


def specs_for(
    targets: Iterable[Target], spec: QuantSpec, overrides: Mapping[str, int] | None
) -> dict[str, QuantSpec]:
    """Return each weight's grid: `spec`, or with the bits of the first override that matches."""
    names = [target.name for target in targets]
    check_globs(names, overrides=overrides)
    for bits in (overrides or {}).values():
        check_bits(bits)
    specs = {}
    for name in names:
        own = next((b for g, b in (overrides or {}).items() if fnmatchcase(name, g)), None)
        specs[name] = spec if own is None else _with_bits(spec, own)
    return specs


def _with_bits(spec: QuantSpec, bits: int) -> QuantSpec:
    if spec.bits == bits:
        return spec
    return QuantSpec(bits, None, spec.symmetric if bits > 1 else False, spec.granularity)
