"""What is known of each metric by its name, in one table: which way is better, its unit, the hub's name for it.

A metric that is not in the table still works: it is shown as a plain number, may rank checkpoints either way, and has
no name on the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class MetricKind:
    """A kind of metric.

    Attributes:
        better: `min` or `max`, as `checkpoint_metric_mode` says it; None if either may be meant.
        is_share: whether it is a fraction of one, shown in percent.
        hub_name: the `type` of a score in a model card, from the hub's list of metrics; None if it has none.
        needs_answers: whether measuring it scores labels or generates text, where a loss is one forward pass.
    """

    better: Literal["min", "max"] | None = None
    is_share: bool = False
    hub_name: str | None = None
    needs_answers: bool = True


# By the last part of the name: `eval/f1`, and `eval/has_answer_f1` and `eval/f1_answerable` with it.
METRICS: Mapping[str, MetricKind] = {
    "loss": MetricKind("min", needs_answers=False),
    "perplexity": MetricKind("min", hub_name="perplexity", needs_answers=False),
    "accuracy": MetricKind("max", is_share=True, hub_name="accuracy"),
    "accuracies": MetricKind("max", is_share=True),
    "margins": MetricKind("max"),
    "exact_match": MetricKind("max", is_share=True, hub_name="exact_match"),
    "f1": MetricKind("max", is_share=True, hub_name="f1"),
    "rouge_l": MetricKind("max", is_share=True, hub_name="rouge"),
    "precision": MetricKind("max", is_share=True),
    "recall": MetricKind("max", is_share=True),
    "share": MetricKind(is_share=True),
}
UNKNOWN = MetricKind()


def kind_of(name: str) -> MetricKind:
    """What the table says of `eval/exact_match`, `rewards/accuracies`, `eval/no_answer_f1`, ...

    A qualified name has its kind before or behind an underscore; `UNKNOWN` for others.
    """
    last = name.rsplit("/", 1)[-1]
    if last in METRICS:
        return METRICS[last]
    return next(
        (kind for key, kind in METRICS.items() if last.startswith(f"{key}_") or last.endswith(f"_{key}")), UNKNOWN
    )


def hub_name(name: str) -> str | None:
    """The hub's name for a metric of the whole evaluation, such as `eval/f1`; None for a part of it, and for others."""
    prefix, _, last = name.rpartition("/")
    return METRICS[last].hub_name if prefix == "eval" and last in METRICS else None
