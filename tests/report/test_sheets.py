"""Tables of the page, as text; `test_page.py` looks at them in a browser."""

from clipquant.quant.codes.weights import LeftInFloat
from clipquant.report.sheets import Cell, Column, left_sheets, sheet


def test_a_row_tells_its_columns_and_what_it_is_sorted_by():
    columns = [Column("weight", number=False), Column("<bytes>")]
    text = sheet(
        columns,
        [[Cell("a", "a"), Cell("1,000", 1000)], [Cell("b"), Cell("2")]],
        chosen=1,
        sorts=True,
    )
    assert '<td data-label="&lt;bytes&gt;" data-key="1000">1,000</td>' in text
    assert text.count("<tr>") == 2  # the heading and the first row
    assert '<tr class="chosen"><td data-label="weight">b</td>' in text
    assert text.count("<button") == 2
    assert "<button" not in sheet(columns, [])


def test_a_reason_stands_once_over_all_that_share_it():
    left = [LeftInFloat(f"layer_{i}.bias", 4 * i, "bias") for i in range(20)]
    text = left_sheets((*left, LeftInFloat("head.weight", 80, "excluded")))
    assert text.count(">bias<") == 1
    assert f"20 tensors, {sum(4 * i for i in range(20))} bytes" in text
    assert "1 tensor, 80 bytes" in text
    assert "<details open>" not in text  # 21 names are too many to be in the way
    assert "<details open>" in left_sheets(left[:3])
