"""JSON read field by field: each of one kind and in its range, bounded before it is parsed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipquant.fields import (
    DEPTH,
    FieldError,
    entries,
    flag,
    items,
    number,
    one_of,
    read_json,
    shape,
    text,
    whole,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.text(max_size=9)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(VALUES)
def test_what_json_wrote_is_read(value):
    assert read_json(json.dumps(value).encode(), "it", 1 << 20) == value
    assert read_json(json.dumps(value, ensure_ascii=False).encode(), "it", 1 << 20) == value


@given(st.text('\\"[]{}a', max_size=40), st.integers(0, 80))
def test_depth_is_counted_outside_of_strings_alone(name, depth):
    data = ("[" * depth + json.dumps(name) + "]" * depth).encode()
    if depth > DEPTH:
        with pytest.raises(FieldError, match="nested deeper than 64"):
            read_json(data, "it", 1 << 20)
    else:
        read_json(data, "it", 1 << 20)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[1,]", b'"\n"', b"nul", b"[" * 60])
def test_what_is_no_json_is_told(data):
    with pytest.raises(FieldError, match="it is no JSON"):
        read_json(data, "it", 1 << 20)


def test_the_estimate_of_memory_is_above_what_is_taken():
    import tracemalloc

    for data in (
        b"[" + b"[]," * 9999 + b"[]]",
        b'["ab"' + b',"cd"' * 9999 + b"]",
        b"[1.5" + b",2.5" * 9999 + b"]",
    ):
        tracemalloc.start()
        read_json(data, "it", 1 << 30)
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        with pytest.raises(FieldError, match=r"it would take [\d,]+ bytes in memory"):
            read_json(data, "it", taken // 2)


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (lambda v: whole(v, "x", 1, 8), [1, 8], [0, 9, 1.0, "1", True, None, 10**30]),
        (lambda v: number(v, "x"), [1, -2.5], [float("nan"), float("inf"), "1", True, None]),
        (lambda v: text(v, "x", 3), ["", "abc", "\U0001f600"], ["abcd", 1, None, "\ud800"]),
        (lambda v: flag(v, "x"), [True, False], [0, 1, None, "true"]),
        (lambda v: items(v, "x", 2), [[1, 2]], [[1], (1, 2), "ab", {}]),
        (lambda v: entries(v, "x"), [{}, {"a": 1}], [[], None, {"\ud800": 1}, {"a" * 5000: 1}]),
        (lambda v: shape(v, "x"), [[], [0, 5], [2**30, 2**30]], [[-1], [2**31, 2**31], [1] * 33, ["2"], 3]),
        (lambda v: one_of(v, "x", {"a": 1}), ["a"], ["b", None, ["a"], {}]),
    ],
)  # fmt: skip
def test_each_kind_takes_its_own_and_names_the_field_of_any_other(read, good, bad):
    for value in good:
        read(value)
    for value in bad:
        with pytest.raises(FieldError, match="x must be"):
            read(value)
