"""Keywords that a function does not have, told with what the same is called here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from clipquant.errors import ArgumentTypeError

P = ParamSpec("P")
T = TypeVar("T")

# What other libraries call the settings of quantizing, and what they are here; {} stands for the value received.
OF_QUANTIZING = {
    **dict.fromkeys(("nbits", "num_bits", "n_bits", "bit", "w_bits", "wbits"), "bits={}"),
    **dict.fromkeys(("weight_bits", "bitwidth", "precision", "dtype"), "bits={}"),
    **dict.fromkeys(("group_size", "groupsize", "block_size", "blocksize"), "granularity={}"),
    **dict.fromkeys(("per_channel", "channel_wise", "axis"), 'granularity="channel"'),
    **dict.fromkeys(("algorithm", "algo", "quant_method", "observer"), "method={}"),
    **dict.fromkeys(("sym", "asymmetric"), "symmetric=True or False"),
    **dict.fromkeys(("metric", "watch"), "monitor={}"),
    **dict.fromkeys(("tolerance", "max_accuracy_drop", "max_loss"), "max_drop={}"),
    **dict.fromkeys(("size", "budget", "target_size", "max_bytes"), "max_size={}"),
    **dict.fromkeys(("layers", "modules", "targets", "only"), "include=[...], globs over weights"),
    **dict.fromkeys(("skip", "ignore", "skip_modules"), "exclude=[...], globs over weights"),
    **dict.fromkeys(("path", "output_dir", "save_dir", "out", "folder"), "dirpath={}"),
    **dict.fromkeys(("format", "formats", "exports"), 'export=[...], e.g. ["onnx"]'),
    **dict.fromkeys(("calibration_data", "dataloader", "loader", "dataset"), "data={}"),
    **dict.fromkeys(("n_samples", "num_batches", "calib_batches"), "calibration_batches={}"),
    **dict.fromkeys(("eval_fn", "evaluate", "accuracy"), "score={}, a function of the model"),
}


def naming_keywords(
    meant: Mapping[str, str], said: str = "give"
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function say what an unknown keyword is called here; its signature stays.

    Args:
        meant: What others call it -> what to give, "{}" for the value received.
        said: What stands between the two.

    >>> @naming_keywords({"nbits": "bits={}"})
    ... def quantize(bits): ...
    >>> quantize(nbits=4)
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentTypeError: quantize has no argument nbits=4: give bits=4
    """

    def of(function: Callable[P, T]) -> Callable[P, T]:
        owner = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
        known = [name for name in inspect.signature(function).parameters if name != "self"]

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            for name, value in kwargs.items():
                if name not in known:
                    here = type(args[0]).__name__ if function.__name__ == "__init__" else owner
                    raise ArgumentTypeError(_unknown(here, name, value, known, meant, said))
            return function(*args, **kwargs)

        return cast("Callable[P, T]", checked)

    return of


def _unknown(
    owner: str, name: str, value: Any, known: list[str], meant: Mapping[str, str], said: str
) -> str:
    """Return what to say about a keyword that is none of those known."""
    shown = repr(value) if len(repr(value)) <= 60 else type(value).__name__
    what = f"{owner} has no argument {name}={shown}"
    here = meant.get(name, "")
    taken = here.split("=", 1)[0]
    if here and (taken in known or not taken.isidentifier()):
        return f"{what}: {said} {here.replace('{}', shown)}"
    near = get_close_matches(name, known, 1, 0.75)
    close = f"give {near[0]}={shown}" if near else f"its arguments are {', '.join(known)}"
    return f"{what}: {close}"
