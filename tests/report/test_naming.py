"""Names cut to what tells them apart."""

from hypothesis import given
from hypothesis import strategies as st

from clipquant.report.naming import distinct

NAMES = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join)


@given(st.lists(NAMES, unique=True, min_size=2))
def test_names_stay_apart_and_stand_in_the_full_ones(names):
    short = distinct(names, "/")
    assert len(set(short)) == len(names)
    assert all(short)
    assert all(f"/{part}/" in f"/{name}/" for part, name in zip(short, names, strict=True))
    firsts, lasts = ({part.split("/")[end] for part in short} for end in (0, -1))
    # No part that all share is left at either end, unless some name has no other.
    assert min(part.count("/") for part in short) == 0 or (len(firsts) > 1 and len(lasts) > 1)


def test_files_of_one_name_are_told_apart_by_their_folders():
    assert distinct(["a/v0/q/m.s", "a/v1/q/m.s"], "/") == ["v0", "v1"]
    assert distinct(["q/m.onnx", "q/m.int8.onnx"], "/") == ["m.onnx", "m.int8.onnx"]
    assert distinct(["q/m.onnx", "q/m.onnx"], "/") == ["m.onnx", "m.onnx"]
    assert distinct([]) == []


def test_ends_may_stay():
    assert distinct(["net.a.weight", "net.b.weight"], ends=False) == ["a.weight", "b.weight"]
