"""The report as a browser shows it: no complaint, no request, charts that answer to pointer and keyboard."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Chromium, find_chromium

from trietune.tracking.console.console import ConsoleListener
from trietune.tracking.events import Evaluated, RunStarted, StepFinished
from trietune.tracking.open import open_tracker
from trietune.tracking.report.report import write_report

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine"),
]


def make_run(directory: Path, num_steps: int, offset: float) -> None:
    tracker = open_tracker(console=ConsoleListener(io.StringIO(), io.StringIO()))
    tracker.emit(RunStarted(directory.name, directory, num_steps, 0, {"learning_rate": offset}, {"device": "cpu"}))
    for step in range(1, num_steps + 1):
        metrics = {"train/loss": offset + 2.0 / step, "memory_bytes": 1e9}
        tracker.emit(StepFinished(step, step / 10, metrics, ["<img src=x onerror=alert(1)>"], True))
        if step % 5 == 0:
            scores = {"eval/loss": offset + 1.0 / step, "eval/accuracy": 0.5 + step / (3 * num_steps)}
            band = {"eval/accuracy": (0.4 + step / (3 * num_steps), 0.6 + step / (3 * num_steps))}
            tracker.emit(Evaluated(step, step / 10, scores, 100, "during", band))
    tracker.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    hostile = folder / "<script>alert(1)<script>"
    make_run(hostile, 20, 0.1)
    make_run(folder / "long", 120, 0.3)
    write_report([hostile], folder / "one.html")
    write_report([hostile, folder / "long"], folder / "two.html")
    tracker = open_tracker(console=ConsoleListener(io.StringIO(), io.StringIO()))
    tracker.emit(RunStarted("empty", folder / "empty", 5, 0, {}, {}))
    tracker.close()
    write_report([folder / "empty"], folder / "empty.html")
    return {name: folder / f"{name}.html" for name in ("one", "two", "empty")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = find_chromium()
    assert program is not None
    with Chromium(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_complaints(browser: Chromium) -> Iterator[None]:
    """Every test: no error or warning in the console, no violation of the policy, no request but the page's own."""
    browser.complaints.clear()
    browser.requested.clear()
    yield
    assert browser.complaints == []
    assert all(url.startswith("file://") and url.endswith(".html") for url in browser.requested), browser.requested


@pytest.mark.parametrize("name", ["one", "two", "empty"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_page_fits_its_window(browser: Chromium, pages: dict[str, Path], name: str, scheme: str, width: int) -> None:
    browser.open(pages[name], width=width, scheme=scheme)
    assert browser.run("document.documentElement.scrollWidth") <= width
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(251, 251, 249)", "dark": "rgb(20, 22, 26)"}[scheme]
    num_charts = browser.run("document.querySelectorAll('figure').length")
    assert num_charts == {"one": 3, "two": 3, "empty": 0}[name]
    assert browser.run("document.querySelectorAll('figure > svg').length") == num_charts


def test_a_curve_has_its_points_where_they_belong(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    heights = browser.run(
        "[...document.querySelectorAll('figure')[0].querySelectorAll('svg .c0 circle')].map(c => +c.getAttribute('cy'))"
    )
    assert len(heights) == 20
    assert heights == sorted(heights)  # a falling loss falls on the screen
    assert browser.run("document.querySelectorAll('figure')[1].querySelectorAll('.band').length") == 1
    labels = browser.run("[...document.querySelectorAll('figure > svg')].map(s => s.getAttribute('aria-label'))")
    assert "loss: from 0.3 at step 5 to 0.15 at step 20" in labels


def test_the_pointer_reads_a_value(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    box = browser.run(
        "(r => [r.left, r.top, r.width, r.height])(document.querySelector('figure > svg').getBoundingClientRect())"
    )
    browser.move(box[0] + box[2] - 13, box[1] + box[3] / 2)
    tip = "document.querySelector('.tip').innerText"
    assert browser.run(tip).split("\n") == ["step 20", "evaluation: 0.15", "training: 0.2"]
    inside = browser.run(
        "(([t, f]) => t.right <= f.right && t.left >= f.left)"
        "(['.tip', 'figure'].map(s => document.querySelector(s).getBoundingClientRect()))"
    )
    assert inside
    browser.move(2, 2)
    assert browser.run("document.querySelector('.tip').hidden")


def test_the_keyboard_reads_values_too(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    browser.run("document.querySelector('figure').focus()")
    for _ in range(3):
        browser.press("ArrowRight")
    assert browser.run("document.querySelector('.tip').innerText").startswith("step 3\n")
    browser.press("ArrowLeft")
    assert browser.run("document.querySelector('.tip').innerText").startswith("step 2\n")


def test_a_curve_can_be_hidden(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["two"])
    count = "document.querySelectorAll('figure')[0].querySelectorAll('.curve').length"
    before = browser.run(count)
    browser.run("document.querySelectorAll('figure')[0].querySelectorAll('.key')[0].click()")
    assert browser.run(count) == before - 1
    browser.run("document.querySelectorAll('figure')[0].querySelectorAll('.key')[0].click()")
    assert browser.run(count) == before


def test_a_wide_fall_is_drawn_on_a_log_scale_until_told_otherwise(browser: Chromium, tmp_path: Path) -> None:
    tracker = open_tracker(console=ConsoleListener(io.StringIO(), io.StringIO()))
    tracker.emit(RunStarted("fall", tmp_path / "fall", 4, 0, {}, {}))
    for step, loss in enumerate((10.0, 1.0, 0.1), start=1):
        tracker.emit(StepFinished(step, step, {"train/loss": loss}, [], True))
    tracker.close()
    write_report([tmp_path / "fall"], tmp_path / "fall.html")
    browser.open(tmp_path / "fall.html")
    heights = "[...document.querySelectorAll('circle')].map(c => +c.getAttribute('cy'))"
    first, second, third = browser.run(heights)
    assert second - first == pytest.approx(third - second)
    browser.run("document.querySelector('.scale').click()")
    first, second, third = browser.run(heights)
    assert second - first == pytest.approx(10 * (third - second))


def test_hostile_names_run_nothing(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelector('h1').innerText") == "<script>alert(1)<script>"


def test_a_violation_would_be_noticed(browser: Chromium, pages: dict[str, Path], tmp_path: Path) -> None:
    """The same page with one line of script too many, and one picture from elsewhere."""
    tampered = tmp_path / "tampered.html"
    tampered.write_text(
        pages["one"].read_text().replace("</body>", "<script>1</script><img src='https://example.org/x.png'></body>")
    )
    browser.open(tampered)
    complaints = " ".join(browser.complaints)
    assert "inline script" in complaints
    assert "https://example.org/x.png" in complaints
    browser.complaints.clear()
    browser.requested.clear()
