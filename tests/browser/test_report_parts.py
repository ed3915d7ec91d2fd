"""The parts of the page that answer: the picture of a batch, filters, time as x-axis; light, dark, small, printed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Chromium, find_chromium

from tracking.test_changes import labeled
from trietune.tracking.report.report import write_report

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine"),
]

BATCH: dict[str, Any] = {
    "version": 1, "num_examples": 3, "num_left_out": 0, "num_padded": 18, "num_real": 16, "num_distinct": 10,
    "ids": ["a", "b", "<c>"], "lengths": [6, 6, 4],
    "segments": [[0, 3, 0, 2, "<script>alert(1)</script>", []], [0, 2, 2, 4, "shared", []],
                 [0, 1, 4, 6, "one", [[0, 2]]], [1, 2, 4, 6, "two", [[1, 2]]], [2, 3, 2, 4, "three", [[0, 2]]]],
}  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    n, p = "negative", "positive"
    runs = []
    for name in ("one", "two", "three"):
        run = labeled(folder / name, [p, p, n, n, p, p], [n, p, p, p, n, n])
        (run / "batch.json").write_text(json.dumps(BATCH))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [
            {"event": "step", "step": step, "time": 100.0 + 60 * step, "train/loss": 1 / step} for step in range(1, 11)
        ]
        lines = [{**lines[0], "time": 100.0}, *steps, {**lines[-1], "time": 760.0}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(run)
    write_report(runs[:1], folder / "one.html")
    write_report(runs, folder / "three.html")
    return {name: folder / f"{name}.html" for name in ("one", "three")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = find_chromium()
    assert program is not None
    with Chromium(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_complaints(browser: Chromium) -> Iterator[None]:
    browser.complaints.clear()
    browser.requested.clear()
    yield
    assert browser.complaints == []
    assert all(url.startswith("file://") and url.endswith(".html") for url in browser.requested), browser.requested


@pytest.mark.parametrize("name", ["one", "three"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_page_fits_its_window(browser: Chromium, pages: dict[str, Path], name: str, scheme: str, width: int) -> None:
    browser.open(pages[name], width=width, scheme=scheme)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelectorAll('svg.batch').length") == {"one": 2, "three": 6}[name]


def test_widths_are_tokens_and_heights_are_examples(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    sizes = browser.run(
        "[...document.querySelectorAll('svg.batch')[0].querySelectorAll('g.part > rect:first-child')]"
        ".map(r => [+r.getAttribute('x'), +r.getAttribute('width') + .4, +r.getAttribute('height') + .8])"
    )
    scale, row = sizes[0][1] / 2, sizes[0][2] / 3
    assert [[round(x / scale), round(w / scale), round(h / row)] for x, w, h in sizes] == [
        [0, 2, 3], [2, 2, 2], [4, 2, 1], [4, 2, 1], [2, 2, 1],
    ]  # fmt: skip
    paddings = browser.run("document.querySelectorAll('svg.batch')[1].querySelectorAll('.padding').length")
    assert paddings == 3


def test_the_keyboard_walks_through_the_trie(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    browser.run("document.querySelector('.pictures figure').focus()")
    tip = "document.querySelector('.pictures .tip').innerText"
    browser.press("ArrowRight")
    assert browser.run(tip).split("\n") == ["2 tokens, shared by 3 examples", "<script>alert(1)</script>"]
    browser.press("ArrowRight")
    assert browser.run(tip).split("\n") == ["2 tokens, shared by 2 examples", "shared"]


def test_filters_and_search_leave_what_is_wanted(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    shown = "document.querySelector('.shown').textContent"
    assert browser.run(shown) == "6 of 6 shown"
    browser.run("document.querySelector('.filter[data-outcome=fixed]').click()")
    assert browser.run(shown) == "3 of 6 shown"
    browser.run(
        "(s => { s.value = 'TEXT 5'; s.dispatchEvent(new Event('input')); })(document.querySelector('.search'))"
    )
    assert browser.run(shown) == "1 of 6 shown"
    assert browser.run(
        "[...document.querySelectorAll('tr[data-outcome]')].filter(r => !r.hidden)[0].innerText"
    ).startswith("broken")


def test_time_is_an_axis_too(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    last = "[...document.querySelectorAll('#charts figure text')].at(-1).textContent"
    assert browser.run(last) == "10"
    browser.run("document.getElementById('axis').click()")
    assert browser.run(last) == "10 min"


def test_runs_are_told_apart_without_color(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["three"])
    dashes = browser.run(
        "[...document.querySelectorAll('#charts figure')[0].querySelectorAll(':scope > svg path.curve')]"
        ".map(p => getComputedStyle(p).strokeDasharray)"
    )
    assert len(dashes) == 3 == len(set(dashes))


def test_print_shows_every_row(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.run("getComputedStyle(document.querySelector('.rows')).maxHeight") == "none"
    assert browser.run("getComputedStyle(document.querySelector('.filters')).display") == "none"
    assert base64.b64decode(browser.call("Page.printToPDF")["data"]).startswith(b"%PDF")
    browser.call("Emulation.setEmulatedMedia", media="")


def test_on_a_phone_an_examples_text_stands_below_what_was_said_about_it(
    browser: Chromium, pages: dict[str, Path]
) -> None:
    browser.open(pages["one"], width=360)
    said, text, rows = (
        browser.run(
            f"(r => [r.left, r.right, r.top, r.bottom])(document.querySelector('{what}').getBoundingClientRect())"
        )
        for what in (".predictions tbody td", ".predictions tbody .prompt", ".rows")
    )
    assert rows[0] <= text[0] < text[1] <= rows[1]
    assert text[2] >= said[3]
    assert browser.run("(r => r.scrollWidth <= r.clientWidth)(document.querySelector('.rows'))")
    overflowing = "[...document.querySelectorAll('.tables .scroll')].filter(s => s.scrollWidth > s.clientWidth).length"
    assert browser.run(overflowing) == 0
