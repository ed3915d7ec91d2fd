"""The training and validation data of a run, ready to be learned from and measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trietune.data.counts import DataCounts
from trietune.data.examples import Task, TokenSequences
from trietune.data.parts import Part
from trietune.data.templates import PromptFormat


@dataclass(frozen=True, slots=True)
class Data:
    """All that a run needs of its data.

    Attributes:
        validation: None if the data is too small to hold any out.
        source_name: the training data as a person would name it, without the path to it.
        trained_on: the hub's ids of the data sets that training rows come from; empty for files of one's own.
        measured_on: the hub's id of the data set that all validation rows come from; None if there is no such.
        parts: of several files or data sets, the validation data of each, in the order of `validation`.
        lines: of several, what becomes of each in training, for the plan.
        fingerprint: changes whenever a token or a label of either split does; the other two tell them apart, and
            `validation_fingerprint` is empty where there is no validation data.
    """

    train: TokenSequences
    validation: TokenSequences | None
    task: Task
    prompt_format: PromptFormat
    fingerprint: str
    train_fingerprint: str
    validation_fingerprint: str
    counts: DataCounts
    source_name: str = ""
    trained_on: tuple[str, ...] = ()
    measured_on: str | None = None
    parts: tuple[Part, ...] = ()
    lines: tuple[str, ...] = ()

    def with_task(self, task: Task) -> Data:
        """The same data with another task, that of all its parts."""
        parts = tuple(replace(one, prompt_format=replace(one.prompt_format, task=task)) for one in self.parts)
        return replace(self, task=task, prompt_format=replace(self.prompt_format, task=task), parts=parts)
