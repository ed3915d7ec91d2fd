"""The report: one page that needs nothing else, holds hostile data harmlessly, and says what the files say."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trietune.errors import UserError
from trietune.tracking.console.console import ConsoleListener
from trietune.tracking.events import (
    Evaluated,
    Event,
    Prediction,
    PredictionsShown,
    RunFinished,
    RunStarted,
    Saved,
)
from trietune.tracking.open import open_tracker
from trietune.tracking.report.curves import charts_of, thin
from trietune.tracking.report.record import read_run
from trietune.tracking.report.report import ReportListener, embedded_json, report_text, write_report

Events = Callable[..., Iterator[Event]]
Golden = Callable[[str, str], None]


class Page(HTMLParser):
    """What a parser makes of the page: elements with attributes, and the text of each."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.append((self._open[-1], data))

    @property
    def is_closed(self) -> bool:
        return not self._open

    @property
    def words(self) -> str:
        return " ".join(" ".join(text for tag, text in self.texts if tag not in ("script", "style")).split())

    def of(self, tag: str) -> list[str]:
        return [text for found, text in self.texts if found == tag]

    @property
    def data(self) -> dict:
        return json.loads(self.of("script")[0])


def record(events: Iterator[Event]) -> None:
    tracker = open_tracker(console=ConsoleListener(io.StringIO(), io.StringIO()))
    for event in events:
        tracker.emit(event)
    tracker.close()


@pytest.fixture
def run(tmp_path: Path, events: Events) -> Path:
    record(events(tmp_path / "sst2"))
    return tmp_path / "sst2"


def test_a_run_ends_with_a_page_of_its_own(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    assert page.is_closed
    for words in (
        "finished, 12 of 12 steps in 1:33",
        "87.5% 82.5 to 92.5",
        "before: 50.5% (45.5 to 55.5)",
        "After training, step 12, 200 examples; before training, 200 examples.",
        "SmolLM2-135M-Instruct in bfloat16 on cpu",
        "reviews.tsv: 800 read, 792 kept",
        "no Tenstorrent device is here",
        "learning_rate 0.0002",
        "warm and funny",
    ):
        assert words in page.words, words


def test_the_curves_hold_the_numbers_of_the_files(run: Path) -> None:
    charts = {chart["title"]: chart for chart in Page((run / "report.html").read_text()).data["charts"]}
    loss = {series["kind"]: series for series in charts["loss"]["series"]}
    assert loss["train"]["points"] == [[step, 2.0 / step] for step in (2, 4, 6, 8, 10, 12)]
    assert loss["eval"]["points"] == [[0, 2.1034], [6, 2.0 / 6], [12, 0.3911]]
    (accuracy,) = charts["accuracy"]["series"]
    assert accuracy["band"][-1] == [12, pytest.approx(0.825), pytest.approx(0.925)]
    assert charts["memory, GB"]["series"][0]["points"][0][1] == pytest.approx(1.31)
    assert list(charts)[:2] == ["loss", "accuracy"]


def test_the_page_allows_nothing_but_its_own_script_and_style(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    (policy,) = [found["content"] for tag, found in page.elements if found.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag, content in (("style", page.of("style")[0]), ("script", page.of("script")[1])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    for tag, found in page.elements:
        assert not {"src", "href", "style", "srcdoc"} & found.keys(), (tag, found)
        assert not any(name.startswith("on") for name in found), (tag, found)


def test_hostile_text_stays_text(run: Path) -> None:
    """An example that closes the script element, another that comments it, in prose and in data."""
    html = (run / "report.html").read_text()
    page = Page(html)
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert "</script><script>alert(1)</script> &" in page.words
    assert embedded_json(["</script>", "<!--", "&amp;", "\u2028"]) == (
        '["\\u003c/script\\u003e","\\u003c!--","\\u0026amp;","\\u2028"]'
    )
    assert json.loads(embedded_json({"loss": float("nan")})) == {"loss": None}


def test_several_runs_are_compared_on_one_page(tmp_path: Path, events: Events) -> None:
    record(events(tmp_path / "a" / "sst2"))
    record(events(tmp_path / "b" / "sst2", num_steps=24, learning_rate=6e-5))
    out = tmp_path / "both.html"
    write_report([tmp_path / "a" / "sst2", tmp_path / "b" / "sst2"], out)
    page = Page(out.read_text())
    assert page.data["runs"] == [str(tmp_path / "a" / "sst2"), str(tmp_path / "b" / "sst2")]  # one name, two runs
    assert "finished, 24 of 24 steps" in page.words
    assert "Settings that differ key" in page.words
    assert re.search(r"learning_rate 0\.0002 6e-05", page.words)
    (loss,) = [chart for chart in page.data["charts"] if chart["title"] == "loss"]
    assert [series["run"] for series in loss["series"]] == [0, 0, 1, 1]


def test_the_same_report_as_text(run: Path, golden: Golden) -> None:
    golden("tracking/report.txt", report_text([run]).replace(str(run.parent), "runs"))


def test_a_run_that_still_goes_or_was_killed_has_a_report(tmp_path: Path, events: Events) -> None:
    run = [*events(tmp_path / "sst2")]
    record(iter(event for event in run[:14] if not isinstance(event, RunFinished)))
    with (tmp_path / "sst2" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "step", "st')  # killed here
    unfinished = read_run(tmp_path / "sst2")
    assert (unfinished.status, unfinished.num_unreadable, unfinished.predictions) == ("running", 1, [])
    write_report([tmp_path / "sst2"], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert "running, 6 of 12 steps" in page.words
    assert "1 lines of metrics.jsonl could not be read" in page.words


def test_a_run_that_only_started_has_a_report(tmp_path: Path) -> None:
    record(iter([RunStarted("sst2", tmp_path / "sst2", 10, 0, {}, {})]))
    write_report([tmp_path / "sst2"], tmp_path / "report.html")
    assert Page((tmp_path / "report.html").read_text()).data == {
        "runs": ["sst2"], "charts": [], "times": [[]], "batches": [None],
    }  # fmt: skip
    assert "sst2: running, 0 of 10 steps" in report_text([tmp_path / "sst2"])


def test_a_folder_without_a_run_is_said_with_what_is_near(run: Path) -> None:
    with pytest.raises(UserError) as caught:
        write_report([run.parent / "sst3"], run.parent / "out.html")
    assert caught.value.what == f"`{run.parent / 'sst3'}` is not a run: it has no metrics.jsonl"
    assert f"`{run}`" in str(caught.value.next_step)
    assert not (run.parent / "out.html").exists()


def test_thinning_keeps_ends_and_spikes() -> None:
    points = [[step, 1.0] for step in range(50_000)]
    points[31_234][1] = 99.0
    points[7][1] = -5.0
    thinned = thin(points, most=1000)
    assert len(thinned) <= 1000
    assert [31_234, 99.0] in thinned
    assert [7, -5.0] in thinned
    assert [x for x, _ in thinned] == sorted(x for x, _ in thinned)
    assert thin(points[:10], most=1000) == points[:10]


def test_a_long_run_has_a_small_page(tmp_path: Path, events: Events) -> None:
    every = events(tmp_path / "sst2", num_steps=10_000)
    record(event for event in every if not isinstance(event, (Evaluated, Saved)))
    assert (tmp_path / "sst2" / "report.html").stat().st_size < 500_000
    charts = charts_of([read_run(tmp_path / "sst2")])
    assert max(len(series["points"]) for chart in charts for series in chart["series"]) == 1200


def test_writing_the_page_takes_a_hundredth_of_the_time(run: Path) -> None:
    """A clock on which writing takes ten seconds: the next thousand seconds of evaluations pass without it."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 10.0
        return now

    listener = ReportListener(clock=clock)
    listener.handle(RunStarted("sst2", run, 12, 0, {}, {}))
    page = run / "report.html"
    num_written = 0
    for _ in range(60):
        page.unlink(missing_ok=True)
        listener.handle(Evaluated(1, 0.1, {"eval/loss": 1.0}, 10, "during"))
        num_written += page.exists()
    assert num_written == 1
    listener.handle(RunFinished("finished", 12, 1.0, {}))
    assert page.exists()


def test_what_the_model_said_before_stands_beside_what_it_says_now(tmp_path: Path, events: Events) -> None:
    run = [*events(tmp_path / "sst2")]
    said = Prediction("dev.tsv:2", "Review: warm and funny\nOutput:", "positive", "dunno", False)
    before = PredictionsShown(0, "before", [said])
    place = next(number for number, event in enumerate(run) if isinstance(event, Evaluated)) + 1
    record(iter([*run[:place], before, *run[place:]]))
    words = Page((tmp_path / "sst2" / "report.html").read_text()).words
    assert "says expected said before about fixed positive positive dunno Review: warm and funny" in words


@pytest.mark.parametrize("says_it", [True, False])
def test_an_earlier_checkpoint_that_won_does_not_hide_how_the_curve_ended(tmp_path: Path, says_it: bool) -> None:
    directory = tmp_path / "run"

    def evaluated(step: int, loss: float, when: str, weights_step: int | None = None) -> Evaluated:
        metrics = {"eval/loss": loss}
        return Evaluated(step, 1.0, metrics, 20, when, weights_step=weights_step)  # type: ignore[arg-type]

    def events() -> Iterator[Event]:
        yield RunStarted("run", directory, 4, 0, {}, {})
        yield evaluated(0, 2.0, "before")
        yield evaluated(2, 0.125, "during")
        yield evaluated(4, 0.875, "during")
        yield evaluated(4, 0.25, "after", weights_step=2 if says_it else None)
        yield Saved("adapter", 2, directory / "adapter", {}, 0.1)
        yield RunFinished("finished", 4, 1.0, {})

    record(events())
    path = directory / "metrics.jsonl"
    assert ("weights_step" in path.read_text()) == says_it
    [chart] = [chart for chart in charts_of([read_run(directory)]) if chart["title"] == "loss"]
    [series] = [series for series in chart["series"] if series["kind"] == "eval"]
    assert series["points"] == [[0, 2.0], [2, 0.125], [4, 0.875]]
    page = tmp_path / "page.html"
    write_report([directory], page)
    [title] = re.findall(r"<h3>(.*?)</h3>", page.read_text())
    assert title == 'loss <span class="small">step 2</span>'
    assert "an earlier checkpoint was better than the last step" in page.read_text()
    assert "after (step 2)" in report_text([directory])
