"""Lay a run's numbers out as curves: which belong in one chart, and how many points are worth drawing."""

from __future__ import annotations

from collections.abc import Sequence

from trietune.io.json_types import JsonMapping, JsonObject
from trietune.tracking import wording
from trietune.tracking.report.record import RunRecord

MOST_POINTS = 1200
_TITLES = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "examples_per_second": "examples per second",
    "tokens_per_second": "distinct tokens per second",
    "sharing_factor": "sharing factor",
    "memory_bytes": "memory, GB",
    "num_labels": "labels per step",
    "num_micro_batches": "micro-batches per step",
}
_FACTORS = {"memory_bytes": 1e-9}
_STEP_KEYS = ("event", "step", "epoch", "time")


def charts_of(runs: Sequence[RunRecord]) -> list[JsonObject]:
    """Charts for the page: results first (loss of training and evaluation in one), then how the run went.

    Each is {"title", "is_share", "is_result", "series": [{"run", "key", "name", "kind", "points", "band"}]}; points are
    [step, value], a band's [step, low, high].
    """
    charts: dict[str, JsonObject] = {}
    for index, run in enumerate(runs):
        # Two evaluations of one step are a subset and all examples: the later one, of all, is the point.
        # Of a checkpoint that won over the last step, the values would hide how the curve ended.
        evaluations = list({one.step: one for one in run.evaluations if one.is_point}.values())
        for key in dict.fromkeys(key for evaluation in evaluations for key in evaluation.metrics):
            points = [[e.step, value] for e in evaluations if (value := e.metrics.get(key)) is not None]
            band = [[e.step, *e.intervals[key]] for e in evaluations if key in e.intervals]
            _add(charts, key, {"run": index, "key": key, "kind": "eval", "points": points, "band": band})
        for key in dict.fromkeys(key for line in run.steps for key in line if key not in _STEP_KEYS):
            factor = _FACTORS.get(key, 1)
            points = [[line["step"], line[key] * factor] for line in run.steps if _is_number(line.get(key))]
            if points:
                _add(charts, key, {"run": index, "key": key, "kind": "train", "points": thin(points), "band": []})
    for chart in charts.values():
        chart["is_result"] = any("/" in series["key"] for series in chart["series"])
        _name_series(chart["series"], [run.name for run in runs])
    return sorted(charts.values(), key=lambda chart: not chart["is_result"])


def thin(points: Sequence[Sequence[float]], most: int = MOST_POINTS) -> list[Sequence[float]]:
    """At most `most` points with the same outline: of each stretch the lowest and the highest, so no spike is lost."""
    if len(points) <= most:
        return list(points)
    num_stretches = most // 2
    kept: list[Sequence[float]] = []
    for number in range(num_stretches):
        stretch = points[number * len(points) // num_stretches : (number + 1) * len(points) // num_stretches]
        ends = {id(point): point for point in (min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1]))}
        kept.extend(sorted(ends.values(), key=lambda point: point[0]))
    return kept


def _add(charts: dict[str, JsonObject], key: str, series: JsonMapping) -> None:
    title = _TITLES.get(key, wording.metric_name(key))
    empty = {"title": title, "is_share": wording.is_share(key), "series": []}
    charts.setdefault(title, empty)["series"].append(dict(series))


def _name_series(all_series: Sequence[JsonObject], run_names: Sequence[str]) -> None:
    """After what tells them apart: the run, the kind, or both."""
    has_two_kinds = len({series["kind"] for series in all_series}) > 1
    for series in all_series:
        kind = "evaluation" if series["kind"] == "eval" else "training"
        run_name = run_names[series["run"]]
        series["name"] = run_name if not has_two_kinds else kind if len(run_names) == 1 else f"{run_name}, {kind}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
