"""What changed between two sets of answers, and whether it is more than chance."""

from __future__ import annotations

import itertools
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tracking.test_report import Page, record
from trietune.errors import UserError
from trietune.tracking.events import Prediction, PredictionsShown, RunFinished, RunStarted
from trietune.tracking.report.changes import MOST_ROWS, changes_of
from trietune.tracking.report.paired import compare_scores, mcnemar
from trietune.tracking.report.record import read_run
from trietune.tracking.report.report import compare_text, write_report
from trietune.tracking.report.serve import serve_report


@pytest.mark.parametrize(("fixed", "broken"), [(30, 10), (0, 0), (1, 0), (5, 5), (0, 20), (900, 800)])
def test_mcnemar_is_the_exact_binomial_test(fixed: int, broken: int) -> None:
    n = fixed + broken
    expected = 1.0 if n == 0 else stats.binomtest(fixed, n, 0.5).pvalue
    assert mcnemar(fixed, broken) == pytest.approx(expected, rel=1e-9)


def test_a_paired_test_counts_what_changed() -> None:
    before, after = [1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 1, 0]
    found = compare_scores("accuracy", before, after)
    assert (found.num_better, found.num_worse, found.num_examples) == (5, 1, 8)
    assert found.difference == 0.5
    assert found.p_value == pytest.approx(stats.binomtest(5, 6, 0.5).pvalue)
    low, high = found.interval
    assert low < 0.5 < high
    assert str(found).startswith("accuracy: +50.0 points (")


def test_scores_between_zero_and_one_have_a_sign_flip_test() -> None:
    generator = np.random.default_rng(0)
    before = generator.uniform(0, 0.5, 60)
    better = compare_scores("F1", before, before + generator.uniform(0, 0.4, 60))
    same = compare_scores("F1", before, generator.permutation(before))
    assert better.p_value < 0.001
    assert same.p_value > 0.05
    assert same.difference == pytest.approx(0, abs=1e-12)


def said(number: int, expected: str, predicted: str, **more: Any) -> Prediction:
    shares = {"positive": 0.9, "negative": 0.1} if predicted == "positive" else {"positive": 0.2, "negative": 0.8}
    more = {"probabilities": shares, **more}
    return Prediction(
        f"dev.tsv:{number}", f"Review: text {number}\nOutput:", expected, predicted, expected == predicted, **more
    )


def labeled(directory: Path, before: list[str], after: list[str], **environment: Any) -> Path:
    expected = ["positive" if number % 2 else "negative" for number in range(len(after))]
    record(
        iter(
            [
                RunStarted(directory.name, directory, 10, 0, {"lora_r": 4}, environment),
                PredictionsShown(
                    0, "before", [said(n, e, p) for n, (e, p) in enumerate(zip(expected, before, strict=True))]
                ),
                PredictionsShown(
                    10, "after", [said(n, e, p) for n, (e, p) in enumerate(zip(expected, after, strict=True))]
                ),
                RunFinished("finished", 10, 1.0, {}),
            ]
        )
    )
    return directory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    n, p = "negative", "positive"
    return labeled(tmp_path / "run", [p, p, n, n, p, p], [n, p, p, p, n, n])


def test_every_example_is_fixed_broken_or_as_before(run: Path) -> None:
    changes = changes_of(read_run(run))
    assert changes is not None
    assert [(row.outcome, row.id) for row in changes.rows] == [
        ("broken", "dev.tsv:2"), ("broken", "dev.tsv:5"), ("fixed", "dev.tsv:0"), ("fixed", "dev.tsv:3"),
        ("fixed", "dev.tsv:4"), ("still right", "dev.tsv:1"),
    ]  # fmt: skip
    assert changes.counts == {"broken": 2, "fixed": 3, "still right": 1}
    assert changes.confusion == [("positive", [2, 1]), ("negative", [1, 2])]
    assert changes.classes[0] == ("positive", 3, pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert changes.calibration == [
        (pytest.approx(0.8), pytest.approx(2 / 3), 3),
        (pytest.approx(0.9), pytest.approx(2 / 3), 3),
    ]
    assert changes.calibration_error == pytest.approx((0.8 + 0.9) / 2 - 2 / 3)
    (test,) = changes.tests
    assert (test.num_better, test.num_worse) == (3, 2)


def test_the_page_shows_what_changed(run: Path) -> None:
    words = Page((run / "report.html").read_text()).words
    for expected in (
        "What changed accuracy: +16.7 points",
        "broken 2 fixed 3 still right 1",
        "Calibration: mean distance 18.3 points",
        "broken positive 90% negative negative Review: text 2",
    ):
        assert expected in " ".join(words.split()).replace("search", "").replace("  ", " "), expected


def test_a_thousand_rows_of_many_examples_are_shown_and_the_rest_is_counted(tmp_path: Path) -> None:
    size = 2500
    draw = np.random.default_rng(1)
    before, after = (draw.choice(["positive", "negative"], size).tolist() for _ in range(2))
    run = labeled(tmp_path / "run", before, after)
    changes = changes_of(read_run(run))
    assert changes is not None
    assert len(changes.rows) == MOST_ROWS
    assert changes.num_left_out == size - MOST_ROWS
    outcomes = [row.outcome for row in changes.rows]
    assert [name for name, _ in itertools.groupby(outcomes)] == ["broken", "fixed"]
    page = (run / "report.html").read_text()
    assert "1,500 of 2,500 examples have no row here" in page
    assert len(page) < 2_000_000
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 2 * size


def test_long_texts_do_not_make_a_page_long(tmp_path: Path) -> None:
    long = [Prediction(str(n), "word " * 4000, "x" * 5000, "y" * 5000, False) for n in range(MOST_ROWS)]
    record(iter([RunStarted("run", tmp_path / "run", 1, 0, {}, {}), PredictionsShown(1, "after", long, 0),
                 RunFinished("finished", 1, 1.0, {})]))  # fmt: skip
    page = (tmp_path / "run" / "report.html").read_text()
    assert len(page) < 3_000_000
    assert "[18,799 characters left out]" in page


def test_questions_are_told_apart_by_answer_and_length(tmp_path: Path) -> None:
    answers = [
        Prediction("a", "short", "Paris", "Paris", True, f1=1.0, kind="answerable"),
        Prediction("b", "a longer one", "New York", "York", False, f1=2 / 3, kind="answerable"),
        Prediction("c", "the longest prompt of all", "unanswerable", "Rome", False, f1=0.0, kind="unanswerable"),
    ]
    events = [
        RunStarted("run", tmp_path / "run", 1, 0, {}, {}),
        PredictionsShown(1, "after", answers),
        RunFinished("finished", 1, 1.0, {}),
    ]
    record(iter(events))
    changes = changes_of(read_run(tmp_path / "run"))
    assert changes is not None
    assert changes.groups[:2] == [("answerable", 2, 0.5, pytest.approx(5 / 6)), ("unanswerable", 1, 0.0, 0.0)]
    assert changes.groups[2][0] == "shortest prompts, up to 5 characters"
    assert {row.outcome for row in changes.rows} == {"right", "wrong"}


def test_two_runs_are_compared_example_by_example(tmp_path: Path) -> None:
    n, p = "negative", "positive"
    one = labeled(tmp_path / "one", [p] * 6, [n, p, p, p, n, n], validation_fingerprint="a")
    two = labeled(tmp_path / "two", [p] * 6, [n, p, n, p, n, p], validation_fingerprint="a")
    text = compare_text([one, two])
    assert "two against one\n  accuracy: +33.3 points" in text
    assert "2 better and 0 worse of 6 examples, p = 0.5" in text
    assert "warning" not in text
    write_report([one, two], tmp_path / "both.html")
    assert (
        "Against one, example by example two , accuracy: +33.3 points"
        in Page((tmp_path / "both.html").read_text()).words
    )


def test_other_validation_data_is_said_first(tmp_path: Path) -> None:
    p = "positive"
    one = labeled(tmp_path / "one", [p], [p], validation_fingerprint="a")
    two = labeled(tmp_path / "two", [p], [p], validation_fingerprint="b")
    warning = "the runs were measured on different validation data"
    assert warning in compare_text([one, two])
    write_report([one, two], tmp_path / "both.html")
    assert f"warning: {warning}" in Page((tmp_path / "both.html").read_text()).words


def test_a_key_that_an_older_version_did_not_have_is_no_difference(tmp_path: Path) -> None:
    configs = ({"lora_r": 4, "dpo_beta": 0.1, "pairs": "all"}, {"lora_r": 8}, {"lora_r": 4, "dpo_beta": 0.2})
    runs = []
    for name, config in zip("abc", configs, strict=True):
        record(iter([RunStarted(name, tmp_path / name, 1, 0, config, {}), RunFinished("finished", 1, 1.0, {})]))
        runs.append(tmp_path / name)
    text = compare_text(runs[:2])
    assert "\nlora_r  4  8\n" in text
    assert "\nkeys that not every run's version had: dpo_beta: 0.1, pairs: all\n" in text
    write_report(runs, tmp_path / "all.html")
    words = Page((tmp_path / "all.html").read_text()).words
    assert "key a b c lora_r 4 8 4 dpo_beta 0.1 - 0.2" in words
    assert "Keys that not every run's version had (1) pairs: all" in words


# Live


@pytest.fixture
def served(run: Path) -> Iterator[Any]:
    with serve_report([run]) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def _get(server: Any, path: str = "/", host: str | None = None) -> Any:
    address = f"http://127.0.0.1:{server.server_address[1]}{path}"
    return urllib.request.urlopen(urllib.request.Request(address, headers={"Host": host} if host else {}), timeout=20)


def test_the_page_is_served_as_the_files_are_now(served: Any, run: Path) -> None:
    assert served.server_address[0] == "127.0.0.1"
    with _get(served) as answer:
        assert answer.headers["Refresh"] is None
        assert "finished, 10 of 10 steps" in answer.read().decode()
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "start", "step": 10, "time": 1.0, "name": "run", "num_steps": 20}) + "\n")
    with _get(served) as answer:
        assert answer.headers["Refresh"] == "5"
        assert "running, 10 of 20 steps" in answer.read().decode()


@pytest.mark.parametrize(
    ("path", "host", "status"), [("/metrics.jsonl", None, 404), ("/../x", None, 404), ("/", "evil.example", 421)]
)
def test_nothing_else_is_served(served: Any, path: str, host: str | None, status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        _get(served, path, host)
    with raised.value as refused:
        assert refused.code == status


def test_a_folder_without_a_run_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        serve_report([tmp_path])
