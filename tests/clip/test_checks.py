"""Arguments out of range are refused with the rule, the value and the remedy."""

from __future__ import annotations

import numpy as np
import pytest

from clipquant.clip import AdaGC, AutoClip, Norm, Value, ZClip
from clipquant.clip.assign import as_rule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Value(-0.5), "Value: limit must be a number >= 0, got -0.5"),
        (lambda: Value("1.0"), "Value: limit must be a number >= 0, got '1.0'"),
        (lambda: Value(True), "Value: limit must be a number >= 0, got True"),
        (lambda: Norm(float("nan")), "Norm: max_norm must be a number >= 0, got nan"),
        (lambda: Norm(1.0, 0.0), "Norm: norm_type must be a number > 0, got 0.0"),
        (lambda: Norm(1.0, "two"), "Norm: norm_type must be a number > 0, got 'two'"),
        (
            lambda: Norm(1.0, scope="layer"),
            'Norm: scope must be "global", "group" or "tensor", got \'layer\'',
        ),
        (
            lambda: Norm(1.0, warmup_steps=-1),
            "Norm: warmup_steps must be a whole number >= 0, got -1",
        ),
        (lambda: AutoClip(0.0), "AutoClip: percentile must be a number > 0, got 0.0"),
        (lambda: AutoClip(101), "AutoClip: percentile must be at most 100, got 101"),
        (lambda: AutoClip(10, 0), "AutoClip: window must be a whole number >= 1, got 0"),
        (lambda: ZClip(-1.0), "ZClip: z must be a number > 0, got -1.0"),
        (lambda: ZClip(decay=1.0), "ZClip: decay must be below 1, got 1.0"),
        (lambda: ZClip(max_norm=0.0), "ZClip: max_norm must be a number > 0, got 0.0"),
        (lambda: AdaGC(decay=-0.1), "AdaGC: decay must be a number >= 0, got -0.1"),
        (lambda: AdaGC(warmup=2.5), "AdaGC: warmup must be a whole number >= 1, got 2.5"),
    ],
)
def test_values_out_of_range_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()  # type: ignore[operator]
    assert message in str(error.value)


def test_numbers_of_numpy_are_numbers() -> None:
    assert Value(np.float32(0.5)).limit == 0.5
    assert Norm(np.int64(2), np.float64(1.0)).order == 1.0
    assert AutoClip(np.float32(10), np.int64(5)).window == 5
    assert as_rule(np.float32(0.5)) == Value(0.5)
    with pytest.raises(ValueError, match="limit must be a number"):
        Value(np.bool_(True))
