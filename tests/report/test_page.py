"""The HTML report: complete as text, and alive in a real headless Chromium."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clipquant import quantize
from clipquant.export import ExportRecord, Timing
from clipquant.report import Budget, Latency, QuantizationReport, Trial, render_page

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage"
)
LONG = "a_module_with_a_very_long_name.and_a_child_that_is_no_shorter.projection_of_the_output"


def report() -> QuantizationReport:
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Conv2d(8, 16, 3), "fc": nn.Linear(300, 20)})
    outer = nn.Module()
    outer.add_module(LONG.replace(".", "_"), nn.Linear(40, 30))
    model["rest"] = outer
    made = quantize(model, 3, overrides={"conv.*": 8}).report
    layers = tuple(
        replace(layer, sensitivity=s)
        for layer, s in zip(made.layers, (2e-3, 1e-5, 3e-4), strict=True)
    )
    layers = (*layers[:1], replace(layers[1], rows={0: 3, 2: 9, 5: 8}), *layers[2:])
    trials = (
        Trial(3000, 0.9),
        Trial(2000, 0.89, chosen=True),
        Trial(1500, 0.6),
        Trial(2100, 0.7, "uniform"),
    )
    return replace(
        made,
        layers=layers,
        float_metrics={"val_acc": 0.91, "val_loss": 0.3},
        quantized_metrics={"val_acc": 0.89, "val_loss": 0.31},
        monitor="val_acc",
        mode="max",
        budget=Budget(0.03, 2500, trials),
        latency=Latency(1.25, 1.5, 32, 2, "validation_step"),
        seed=11,
        sha256="ab" * 32,
        calibration="16 batches of the train dataloader",
        path="quantized/<model> & co.safetensors",
        exports=(
            ExportRecord(
                "onnx-int8", f"q/{LONG}.int8.onnx", 1_234_567, 0.01, ("activation ranges by MinMax",),
                {"val_acc": 0.885}, (Timing(1, 0.71, 0.25, 2),),
            ).to_dict(),
            ExportRecord("pt2", error="Net has no <graph>").to_dict(),
        ),
    )  # fmt: skip


class Checker(HTMLParser):
    """Collects tags left open and addresses of anything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "link", "br", "wbr", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_one_well_formed_file_that_fetches_nothing() -> None:
    text = render_page(report())
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.fetched == ["data:,"]
    assert not re.search(r"@import|url\(|https?://|fetch\(|XMLHttpRequest", text)


def test_page_says_everything_once_it_is_known() -> None:
    text = render_page(report())
    for said in (
        "Budget met: drop at most 0.03 and at most 2,500 bytes",
        "val_acc 0.910 to 0.890",
        "float 0.300, same batches",
        "1.5 ms",
        "batch 32, 2 threads",
        "ab" * 32,
        "16 batches of the train dataloader",
        "bias, normalization or other vector",
        "quantized/<wbr>&lt;model&gt; &amp; co.safetensors",
        '<td data-label="bytes">1,234,567</td><td data-label="metric">val_acc 0.885</td>',
        '<td data-label="latency, ms">0.250 (batch 1)</td>',
        '<td data-label="float ONNX, ms">0.710 (batch 1)</td>',
        "medians in onnxruntime with 2 threads",
        "activation ranges by MinMax",
        "pt2 failed: Net has no &lt;graph&gt;",
    ):
        assert said in text
    assert (
        "<li>Export pt2 failed: Net has no &lt;graph&gt;</li>" in text
    )  # among what is to be looked at
    missed = replace(report(), budget=Budget(0.01, failure="the drop is 0.02"))
    assert 'class="verdict missed">Budget missed: the drop is 0.02' in render_page(missed)


def test_page_says_what_is_not_believed() -> None:
    turned = replace(report(), mode="min", budget=None, quantized_metrics={"val_acc": 0.1})
    text = render_page(turned)
    assert 'class="verdict missed">Not believed: val_acc went from 0.91 to 0.1' in text
    assert text.count("more than rounding weights can explain") == 1
    failed = replace(report(), failures=("exporting: no room; the file is whole",))
    assert "<li>exporting: no room; the file is whole</li>" in render_page(failed)


def test_page_of_one_width_shows_neither_widths_nor_what_was_not_estimated() -> None:
    made = quantize(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20)), 8).report
    text = render_page(made)
    assert "<h2>Bits</h2>" not in text
    assert "sensitivity" not in text
    assert "256 values in steps of" not in text  # 255 steps of 8 bits, symmetric about zero
    assert "255 values in steps of" in text
    assert text.count('class="level"') == 2 * 3  # ends of the grid and the line that joins them
    assert "<h2>Bits</h2>" in render_page(report())
    assert "sensitivity" in render_page(report())


def test_page_of_a_bare_report_has_no_empty_sections() -> None:
    text = render_page(quantize(nn.Linear(4, 4), 8).report)
    assert "The search for the budget" not in text
    assert "Exports" not in text
    assert "latency" not in text
    assert "none: chosen from the weights alone" in text
    lost = quantize(nn.Linear(4, 4), 8).report
    unknown = replace(lost, layers=(replace(lost.layers[0], sqnr_db=math.nan, histogram=None),))
    assert "not recorded" in render_page(unknown)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chrome = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    driver = shutil.which("chromedriver")
    if chrome is None or driver is None:
        pytest.skip("needs Chromium and chromedriver (Debian: chromium, chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=Service(driver))
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(report()), "utf-8")
    session.get(path.as_uri())
    yield session
    session.quit()


def test_no_console_errors(browser: Any) -> None:
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_fits_phone_and_desktop_in_both_schemes(
    browser: Any, width: int, scheme: str, tmp_path: Path
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    spilt = browser.execute_script(
        """return [...document.querySelectorAll("main *")].filter((element) =>
             !element.closest(".scroll") && !element.closest("svg")
             && element.getBoundingClientRect().right > innerWidth + 1).length"""
    )
    assert spilt == 0
    beyond = browser.execute_script(
        """return [...document.querySelectorAll(".scroll")]
             .filter((table) => table.scrollWidth > table.clientWidth + 1).length"""
    )
    assert beyond == 0
    if width < 500:
        label = browser.execute_script(
            """return getComputedStyle(document.querySelector(".sortable td:last-child"), "::before").content"""
        )
        assert label.startswith("attr(data-label)") or "share of file" in label
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    shades = [int(part) for part in re.findall(r"\d+", paper)[:3]]
    assert max(shades) < 60 if scheme == "dark" else min(shades) > 200


def test_every_plot_has_marks_that_can_be_seen(browser: Any) -> None:
    counts = browser.execute_script(
        """return [...document.querySelectorAll("svg.plot")].map((plot) => [
             plot.classList[1],
             [...plot.querySelectorAll("rect, circle, line.level")].filter((mark) => {
               const box = mark.getBoundingClientRect();
               return box.width + box.height > 0.5 && getComputedStyle(mark).visibility === "visible";
             }).length])"""
    )
    kinds = [kind for kind, _ in counts]
    assert kinds == ["search", "bits", "sqnr", "histogram", "histogram", "histogram"]
    least = {"search": 4, "bits": 5, "sqnr": 3, "histogram": 24 + 8}
    assert all(count >= least[kind] for kind, count in counts)


def column(browser: Any, index: int) -> list[str]:
    script = f"return [...document.querySelectorAll('table.sortable tbody tr')].map(r => r.cells[{index}].innerText)"
    texts: list[str] = browser.execute_script(script)
    return texts


def test_a_click_on_a_heading_sorts_and_a_second_turns_it_round(browser: Any) -> None:
    from selenium.webdriver.common.by import By

    heads = browser.find_elements(By.CSS_SELECTOR, "table.sortable th")
    for index, head in enumerate(heads):
        button = head.find_element(By.TAG_NAME, "button")
        browser.execute_script("arguments[0].click()", button)
        down = column(browser, index)
        assert head.get_attribute("aria-sort") == "descending"
        browser.execute_script("arguments[0].click()", button)
        up = column(browser, index)
        assert head.get_attribute("aria-sort") == "ascending"
        if len(set(up)) == len(up):
            assert up == down[::-1]
    sizes = [h.text.split()[0] for h in heads].index("bytes")
    browser.execute_script("arguments[0].click()", heads[sizes].find_element(By.TAG_NAME, "button"))
    values = [int(text.replace(",", "")) for text in column(browser, sizes)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 3
    marked = [h.get_attribute("aria-sort") for h in heads]
    assert [m for m in marked if m] == ["descending"]


def test_still_no_console_errors_after_use(browser: Any) -> None:
    assert browser.get_log("browser") == []


def test_a_long_table_is_folded_and_sorts_whole(browser: Any, tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8 + i % 3) for i in range(40)))
    path = tmp_path / "many.html"
    path.write_text(render_page(quantize(model, 4).report), "utf-8")
    browser.get(path.as_uri())
    shown = """return [...document.querySelectorAll(".sortable tbody tr")]
                 .filter((row) => row.getBoundingClientRect().height > 0).length"""
    assert browser.execute_script(shown) == 24
    browser.execute_script("document.querySelectorAll('.sortable th button')[0].click()")
    assert column(browser, 0)[0] == "9.weight"
    assert (
        browser.execute_script("return document.querySelector('.more').textContent")
        == "Show all 40"
    )
    browser.execute_script("document.querySelector('.more').click()")
    assert browser.execute_script(shown) == 40
    assert "The 24 lowest of 40 weights" in path.read_text("utf-8")
    assert browser.get_log("browser") == []


def test_names_of_strangers_neither_turn_nor_mark_nor_run(browser: Any, tmp_path: Path) -> None:
    evil = 'w\u202egnp.\u2066\x1b[31m"><img src=x onerror="document.title=1"><script>document.title=2</script>'
    made = report()
    layers = (replace(made.layers[0], name=evil, note=evil, method=evil), *made.layers[1:])
    texts = {"monitor": evil, "float_metrics": {evil: 0.9}, "quantized_metrics": {evil: 0.8}}
    said = replace(
        made, layers=layers, environment={evil: evil}, calibration=evil, path=evil, **texts
    )
    path = tmp_path / "evil.html"
    path.write_text(render_page(said), "utf-8")
    browser.get(path.as_uri())
    assert browser.title.startswith("Quantization report")
    assert browser.execute_script("return document.images.length") == 0
    seen = browser.execute_script("return document.body.innerText")
    assert seen.count("w\\u202egnp.\\u2066\\x1b[31m") >= 5
    assert not set(seen) & set("\u202e\u2066\x1b")
    source = path.read_text("utf-8")
    assert not set(source) & set("\u202e\u2066\x1b")
    assert browser.get_log("browser") == []
