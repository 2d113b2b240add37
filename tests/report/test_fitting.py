"""Tables that fit a screen: nothing is lost, and no figure or short word is broken."""

from hypothesis import given
from hypothesis import strategies as st

from clipquant.report.fitting import fit_table, wrap

PARTS = st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=6)
NAMES = st.one_of(PARTS.map(".".join), PARTS.map("_".join), PARTS.map(" ".join))
FIGURES = st.integers(0, 10**9).map(lambda n: f"{n:,}")


def lines_of(row):
    return [line for cell in row for line in cell.split("\n")]


@given(st.lists(st.tuples(NAMES, FIGURES, FIGURES), min_size=1, max_size=5), st.integers(1, 90))
def test_cells_keep_their_text_and_figures_stay_whole(rows, width):
    header = ("weight", "bytes", "step")
    fitted = fit_table(header, rows, width)
    for before, after in zip([header, *rows], fitted, strict=True):
        assert [c.replace("\n", "").replace(" ", "") for c in after] == [
            c.replace(" ", "") for c in before
        ]
        assert tuple(after[1:]) == before[1:]
    widest = sum(max(len(line) for line in lines_of(col)) for col in zip(*fitted, strict=True))
    whole = sum(max(map(len, col)) for col in zip(header, *rows, strict=True))
    assert widest <= max(whole, 1)
    if width >= whole + 4:
        assert fitted == [list(header), *map(list, rows)]


def test_spare_columns_go_first_and_only_as_many_as_must():
    rows = [("conv1.weight", "4x1x3x3", "1,179,904", "5.1%")]
    header = ("weight", "shape", "bytes", "share")
    assert fit_table(header, rows, 80, ("share", "shape"))[0] == list(header)
    assert fit_table(header, rows, 36, ("share", "shape"))[0] == ["weight", "shape", "bytes"]
    assert fit_table(header, rows, 24, ("share", "shape")) == [
        ["weight", "bytes"],
        ["conv1.weight", "1,179,904"],
    ]


def test_long_words_break_where_their_parts_meet():
    assert wrap("runs/version_10/quantized/model.onnx", 18).split("\n") == [
        "runs/version_10/",
        "quantized/model.",
        "onnx",
    ]
    assert wrap("", 5) == ""
