"""`trietune evaluate`: metrics of a model, and thresholds that they must reach."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from trietune.cli.options import AsJson, MaybePath, MaybeText, Overrides, Target
from trietune.cli.printing import console, print_json, say_line
from trietune.cli.streams import verdict
from trietune.errors import EXIT_DONE, EXIT_THRESHOLD_MISSED, UserError

if TYPE_CHECKING:
    from trietune.evaluation.evaluate import Evaluation


def evaluate(
    target: Target,
    dataset: Annotated[
        list[str],
        typer.Option(
            "--dataset",
            "--data",
            help="Hub id, file or folder; default: the run's data. Several are measured together and each.",
        ),
    ] = [],  # noqa: B006
    split: Annotated[
        MaybeText,
        typer.Option(help="train, validation or test; default: validation, or every row of --dataset without one."),
    ] = None,
    max_examples: Annotated[Optional[int], typer.Option(min=1, help="A random subset of this size.")] = None,  # noqa: UP045
    require: Annotated[
        list[str], typer.Option(metavar="METRIC>=VALUE", help="Exit with 4 if this does not hold; may be repeated.")
    ] = [],  # noqa: B006
    predictions: Annotated[
        MaybePath,
        typer.Option(
            "--predictions", metavar="FILE", help="Write predictions here: SQuAD's JSON for questions, else JSONL."
        ),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Measure a run, an adapter or a base model."""
    from trietune.cli.typed_keys import as_value
    from trietune.run.opened import evaluate as measure

    if dataset:
        # A run's own files would win over the data set that is asked for here.
        cleared = ["train_file=null", "validation_file=null", "data_shares=null"]
        overrides = [*cleared, f"dataset_id={as_value(dataset)}", *overrides]
    bounds = [_parse_bound(text) for text in require]
    with console() as tracker:
        found = measure(
            target, overrides=overrides, split=split, max_examples=max_examples, tracker=tracker, keep=predictions
        )
    missed = [text for text, (name, is_least, value) in zip(require, bounds, strict=True)
              if not _holds(found, name, is_least, value)]  # fmt: skip
    with verdict(EXIT_THRESHOLD_MISSED if missed else EXIT_DONE):
        if as_json:
            print_json(
                {
                    "target": target,
                    "split": split or (None if dataset else "validation"),
                    "num_examples": found.num_examples,
                    "metrics": dict(found.metrics),
                    "intervals": {name: list(bound) for name, bound in found.intervals.items()},
                }
            )
        else:
            for line in _evaluation_lines(found):
                say_line(line)
        if missed:
            say_line(f"not reached: {', '.join(missed)}", err=True)


def _parse_bound(text: str) -> tuple[str, bool, float]:
    for sign, is_least in ((">=", True), ("<=", False)):
        name, found, value = text.partition(sign)
        if found:
            try:
                return name.strip() if "/" in name else f"eval/{name.strip()}", is_least, float(value)
            except ValueError:
                break
    raise UserError(f"`--require {text}` is not a threshold", next_step="--require 'accuracy>=0.9'   (or <=)")


def _holds(found: Evaluation, name: str, is_least: bool, bound: float) -> bool:
    if name not in found.metrics:
        raise UserError(
            f"`--require` names `{name}`, which was not measured", next_step=f"one of {', '.join(found.metrics)}"
        )
    value = found.metrics[name]
    return value >= bound if is_least else value <= bound


def _evaluation_lines(found: Evaluation) -> list[str]:
    from trietune.io.columns import columns
    from trietune.tracking import wording

    rows = [("examples", f"{found.num_examples:,}", "")]
    for name, value in found.metrics.items():
        interval = f"({wording.interval(name, *found.intervals[name])})" if name in found.intervals else ""
        rows.append((wording.metric_name(name), wording.metric_value(name, value), interval))
    lines = columns(rows)
    return [*lines, "(95% intervals in parentheses)"] if found.intervals else lines
