"""Text of others inside HTML."""

import re

from hypothesis import given
from hypothesis import strategies as st

from clipquant.report.text import breakable, escape


@given(st.text())
def test_places_to_break_change_nothing_of_the_text(text):
    assert breakable(text).replace("<wbr>", "") == escape(text)


def test_long_names_break_where_parts_meet():
    name = "encoder.layers.0.self_attention/out.weight"
    pieces = breakable(name).split("<wbr>")
    assert max(map(len, pieces)) <= len("attention/")
    assert all(re.search(r"[._/]$", piece) for piece in pieces[:-1])
