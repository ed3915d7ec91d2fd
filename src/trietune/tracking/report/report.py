"""One self-contained HTML page about one run, or several compared; and the same as text.

The page needs no network and no other file. Its script and style are named by hash in a content policy that allows
nothing else, and all data sits in one JSON element, escaped so that no text of an example can leave it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from trietune.errors import UserError
from trietune.io.columns import columns
from trietune.io.json_types import JsonMapping, JsonObject
from trietune.io.outputs import write_output
from trietune.tracking import wording
from trietune.tracking.console import result
from trietune.tracking.events import Evaluated, Event, PredictionsShown, RunFinished, RunStarted
from trietune.tracking.jsonl import plain
from trietune.tracking.report.batch import batch_numbers
from trietune.tracking.report.changes import changes_of, left_out_of, paired_tests
from trietune.tracking.report.curves import charts_of, thin
from trietune.tracking.report.paired import PairedTest
from trietune.tracking.report.record import RunRecord, read_run

PAGE = Path(__file__).with_name("page")
REPORT = "report.html"
LARGEST_SHARE_OF_TIME = 0.01
SPARKLINE_WIDTH = 60
_LEFT_OUT = re.compile(r"\bkept\b|\bdropped\b|\bleft out\b|\bheld out\b|\bshortened\b")


def write_report(run_directories: Sequence[Path], out: Path) -> None:
    """Write the page for these runs to `out`, whole or not at all.

    Raises:
        UserError: a folder without a run, `out` is something else than a plain file, such as a link or a device, or the
            disk refused.
    """
    write_output(out, render_runs(run_directories).encode(), "the report")


def render_runs(run_directories: Sequence[Path]) -> str:
    """The page for these runs as text. Raises `UserError` for a folder without a run."""
    return render_page(_read_runs(run_directories))


def render_page(runs: Sequence[RunRecord]) -> str:
    """The page as text; the same runs give the same text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        value=_shown_value, duration=wording.duration, left_out_of=left_out_of, left_out_notes=left_out_notes
    )
    style = (PAGE / "report.css").read_text()
    script = (PAGE / "report.js").read_text()
    return environment.get_template("report.html.jinja").render(
        runs=runs,
        title=" and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs",
        rows=[_rows_of(run) for run in runs],
        metrics=_metrics_of(runs),
        batches=[batch_numbers(run) for run in runs],
        changes=[changes_of(run) for run in runs],
        comparisons=comparisons(runs),
        warnings=data_warnings(runs),
        commands=[_commands(run) for run in runs],
        differences=differences([run.config for run in runs]),
        keys_of_some=keys_of_some([run.config for run in runs]),
        policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'",
        style=style,
        script=script,
        data=embedded_json(_data_of(runs)),
    )


def report_text(run_directories: Sequence[Path]) -> str:
    """The report for a terminal."""
    runs = _read_runs(run_directories)
    lines: list[str] = []
    for run in runs:
        lines += [f"{run.name}: {status_line(run)}", ""]
        lines += [*result.comparison(run.evaluation("before"), run.newest_evaluation()), ""]
        lines += [*sparklines(run), ""]
        if run.predictions:
            predicted = PredictionsShown(run.last_step, run.predicted_when, run.predictions)
            lines += [*result.predictions_table(predicted, result.DEFAULT_WIDTH), ""]
        lines += _change_lines(run)
    lines += [*data_warnings(runs), *comparison_lines(runs)]
    lines += [*_settings_lines(runs), ""]
    return "\n".join(lines).rstrip() + "\n"


def compare_text(run_directories: Sequence[Path]) -> str:
    """Two runs against each other, for a terminal: paired tests of what they say, and the settings that differ."""
    runs = _read_runs(run_directories)
    lines = [f"{run.name}: {status_line(run)}" for run in runs]
    lines += ["", *data_warnings(runs), *comparison_lines(runs)]
    lines += ["", *_settings_lines(runs)]
    return "\n".join(lines).rstrip() + "\n"


def _settings_lines(runs: Sequence[RunRecord]) -> list[str]:
    configs = [run.config for run in runs]
    lines = []
    if differing := differences(configs):
        lines += ["settings that differ", *columns([["", *(run.name for run in runs)], *differing])]
    if new := keys_of_some(configs):
        lines.append(f"keys that not every run's version had: {', '.join(new)}")
    return lines


def comparison_lines(runs: Sequence[RunRecord]) -> list[str]:
    """Every later run against the first, in words."""
    lines = []
    for name, tests in comparisons(runs):
        lines.append(f"{name} against {runs[0].name}")
        lines += [f"  {test}" for test in tests] or ["  no example was judged right or wrong in both runs"]
    return lines


def comparisons(runs: Sequence[RunRecord]) -> list[tuple[str, list[PairedTest]]]:
    """Paired tests of each later run against the first, over the examples that both answered."""
    if len(runs) < 2:
        return []
    first = {prediction.id: prediction for prediction in runs[0].predictions}
    found = []
    for run in runs[1:]:
        both = [prediction for prediction in run.predictions if prediction.id in first]
        found.append((run.name, paired_tests([first[prediction.id] for prediction in both], both)))
    return found


def data_warnings(runs: Sequence[RunRecord]) -> list[str]:
    """What keeps runs from being compared: other data to train on, or other examples to be measured on."""
    names = {
        "validation_fingerprint": "the runs were measured on different validation data: figures are not comparable",
        "data_fingerprint": "the runs were trained on different data",
        "base_digest": "the runs have different base models",
    }
    return [
        text
        for key, text in names.items()
        if len({run.environment.get(key) for run in runs if run.environment.get(key) is not None}) > 1
    ]


def _change_lines(run: RunRecord) -> list[str]:
    changes = changes_of(run)
    if changes is None or not changes.tests:
        return []
    return ["before against after", *(f"  {test}" for test in changes.tests), ""]


def left_out_notes(run: RunRecord) -> list[str]:
    """What the run said of examples that it did not take, each sentence once."""
    texts = dict.fromkeys(text for _, text in run.notes if _LEFT_OUT.search(text))
    return list(texts)


def _commands(run: RunRecord) -> list[tuple[str, str]]:
    """What to type next, with what it is for; only what this run can do."""
    if not (run.directory / "adapter" / "adapter_config.json").is_file():
        return []
    place = run.directory
    return [
        ("ask it", f"trietune predict {place}"),
        ("measure it", f"trietune evaluate {place}"),
        ("for llama.cpp, LM Studio", f"trietune export {place} OUT --to gguf --merge"),
        ("for Ollama", f"trietune export {place} OUT --to ollama --merge"),
        ("for vLLM", f"trietune export {place} OUT --to vllm"),
        ("for MLX", f"trietune export {place} OUT --to mlx"),
        ("in Python", f'PeftModel.from_pretrained(base, "{place / "adapter"}")'),
    ]


def _data_of(runs: Sequence[RunRecord]) -> JsonObject:
    """What the page's script draws."""
    return {
        "runs": [run.name for run in runs],
        "charts": charts_of(runs),
        "times": [thin(_without_repeated_steps(run.times)) for run in runs],
        "batches": [run.batch for run in runs],
    }


def _without_repeated_steps(times: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return sorted(dict(times).items())


class ReportListener:
    """Keeps `report.html` in the run's folder up to date: at each evaluation, and at the end.

    Writing takes at most one hundredth of a run's time: an evaluation that comes too soon leaves the page as it is.
    """

    name = "report"

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._directory: Path | None = None
        self._not_before_s = 0.0

    def handle(self, event: Event) -> None:
        """Write the page if it is due. Raises OSError."""
        match event:
            case RunStarted():
                self._directory = event.directory
            case RunFinished():
                self._write()
            case Evaluated() if self._clock() >= self._not_before_s:
                self._write()
            case _:
                pass

    def close(self) -> None:
        """Nothing is open."""

    def _write(self) -> None:
        if self._directory is None:
            return
        began_s = self._clock()
        try:
            write_report([self._directory], self._directory / REPORT)
        except UserError as error:
            raise OSError(error.what) from error
        now_s = self._clock()
        self._not_before_s = now_s + (now_s - began_s) / LARGEST_SHARE_OF_TIME


def embedded_json(content: object) -> str:
    """Strict JSON that can stand in a script element: whatever could end or comment it is escaped."""
    text = json.dumps(plain(content), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode("utf-8", "replace").decode()


def differences(configs: Sequence[JsonMapping]) -> list[list[str]]:
    """Settings that are not the same in all of these, as rows of key and one value each.

    A run holds every key of the version that wrote it. One that a run does not know is a difference only between those
    that do; `keys_of_some` names the others.
    """
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = []
    for key in keys:
        known = {_shown_value(config[key]) for config in configs if key in config}
        if len(known) > 1:
            rows.append([key, *(_shown_value(config.get(key)) for config in configs)])
    return rows


def keys_of_some(configs: Sequence[JsonMapping]) -> list[str]:
    """`objective: dpo`: keys with the value that they have in the runs that know them, where not all runs do."""
    keys = dict.fromkeys(key for config in configs for key in config)
    found = []
    for key in keys:
        known = {_shown_value(config[key]) for config in configs if key in config}
        if len(known) == 1 and not all(key in config for config in configs):
            found.append(f"{key}: {known.pop()}")
    return found


def sparklines(run: RunRecord) -> list[str]:
    """Each curve of losses and shares in one line, from its first value to its last."""
    rows = []
    for chart in charts_of([run]):
        for series in chart["series"]:
            if not chart["is_result"] or not series["points"]:
                continue
            values = [y for _, y in series["points"]]
            values = values[:: max(1, -(-len(values) // SPARKLINE_WIDTH))]
            low, high = min(values), max(values)
            levels = [round(7 * (y - low) / (high - low)) if high > low else 0 for y in values]
            first, last = (wording.metric_value(series["key"], y) for y in (values[0], series["points"][-1][1]))
            rows.append((series["key"], first, "".join("▁▂▃▄▅▆▇█"[level] for level in levels), last))
    return columns(rows)


def _read_runs(directories: Sequence[Path]) -> list[RunRecord]:
    """Runs of different projects can have one name; their paths then tell them apart."""
    runs = [read_run(directory) for directory in directories]
    names = [run.name for run in runs]
    return [replace(run, name=str(run.directory)) if names.count(run.name) > 1 else run for run in runs]


def status_line(run: RunRecord) -> str:
    """`finished, 400 of 400 steps in 2:10`."""
    text = f"{run.status}, {run.last_step:,} of {run.num_steps:,} steps"
    return f"{text} in {wording.duration(run.seconds)}" if run.seconds is not None else text


def _rows_of(run: RunRecord) -> JsonObject:
    """What the page says of one run, in words."""
    before, after = run.evaluation("before"), run.newest_evaluation()
    keys = dict.fromkeys(key for evaluation in (before, after) if evaluation for key in evaluation.metrics)
    return {
        "status": status_line(run),
        "num_examples": [f"{evaluation.num_examples:,}" if evaluation else "-" for evaluation in (before, after)],
        "metrics": {key: [_cell(before, key), _cell(after, key)] for key in keys},
        "after_title": "after training" if run.evaluation("after") else "so far",
        "steps": [f"step {evaluation.measured_step:,}" if evaluation else "-" for evaluation in (before, after)],
        "is_earlier": bool(after and not after.is_point),
    }


def _cell(evaluation: Evaluated | None, key: str) -> JsonObject:
    if evaluation is None or key not in evaluation.metrics:
        return {"value": "-", "interval": None}
    pair = evaluation.intervals.get(key)
    interval = wording.interval(key, *pair) if pair else None
    return {"value": wording.metric_value(key, evaluation.metrics[key]), "interval": interval}


def _metrics_of(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """(key, name) of every evaluated metric, in the order in which runs report them."""
    keys = dict.fromkeys(key for run in runs for evaluation in run.evaluations for key in evaluation.metrics)
    return [(key, wording.metric_name(key)) for key in keys]


def _shown_value(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, Mapping):
        return json.dumps(plain(value), ensure_ascii=False)
    return str(value)


def _hash(content: str) -> str:
    """As a content policy names it; of exactly what stands between the tags."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
